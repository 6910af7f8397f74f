"""Count the held-out captions that the small FLUX draws right, by a check of the pixels, and measure its shapes.

    python examples/evaluate_small_flux.py --output benchmarks/results/small_flux.json

Each caption has its own seed, so that the result does not depend on the batch. Captions alternate between the wordings
of a scene.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import FluxPipeline
from PIL import Image

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo.scene_reader import read
from clear_attn.demo.scenes import Figure, Scene, held_out_scenes
from clear_attn.models._diffusers import load_pretrained
from clear_attn.utils.image_sheets import contact_sheet

STEPS = 28  # the pipeline's default
FEWER_STEPS = 12  # as many of the first 40 captions are right
SHOWN = 6


def load(model: Path | None) -> FluxPipeline:
    """Return a small FLUX in float32, on the GPU if there is one, without progress bars.

    It is that of a folder, by default the one in the package.
    """
    pipe: FluxPipeline = load_pretrained(FluxPipeline, model or demo.path(), dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def captions_of(scenes: Sequence[Scene]) -> list[str]:
    """Return one wording of each scene, in turn the first and the last."""
    return [scene.captions[number % len(scene.captions)] for number, scene in enumerate(scenes)]


def draw(
    pipe: FluxPipeline, scenes: Sequence[Scene], text_tokens: int, batch: int, steps: int = STEPS
) -> list[np.ndarray]:
    """Return an image for each scene, uint8 `[SIZE, SIZE, 3]`."""
    images: list[np.ndarray] = []
    for first in range(0, len(scenes), batch):
        captions = captions_of(scenes)[first : first + batch]
        drawn = pipe(
            captions,
            height=demo.SIZE,
            width=demo.SIZE,
            max_sequence_length=text_tokens,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(first + number) for number in range(len(captions))],
        )
        images += [np.asarray(image) for image in drawn.images]
    return images


def score(scenes: Sequence[Scene], images: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the number of images that show their scene, and parts of it, and the median overlap of their shapes."""
    readings = [read(image) for image in images]
    pairs = [(scene, reading.scene) for scene, reading in zip(scenes, readings, strict=True) if reading]
    same = [(ours, theirs) for ours, theirs in pairs if len(ours.figures) == len(theirs.figures)]

    def figures(part: Callable[[Figure], Any]) -> int:
        return sum([*map(part, ours.figures)] == [*map(part, theirs.figures)] for ours, theirs in same)

    overlaps = [overlap for reading in readings if reading for overlap in reading.overlaps]
    return {
        "captions": len(scenes),
        "right": sum(ours == theirs for ours, theirs in pairs),
        "clear": len(pairs),
        "layout": sum(ours.layout == theirs.layout for ours, theirs in pairs),
        "ground": sum(ours.ground == theirs.ground for ours, theirs in pairs),
        "shapes": figures(lambda figure: figure.shape),
        "colors": figures(lambda figure: figure.surface.color),
        "surfaces": figures(lambda figure: figure.surface),
        "median_overlap": round(float(np.median(overlaps)), 4) if overlaps else 0.0,
    }


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the pipeline; default: the one in the package.")] = None,
    window: Annotated[int | None, typer.Option(help="Radius in tokens; dense without it.")] = None,
    down_factor: Annotated[int, typer.Option(help="Side of the pooled cells in tokens.")] = 1,
    weights: Annotated[str | None, typer.Option(help="Distilled weights; none: the model's own.")] = None,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 200,
    text_tokens: Annotated[int, typer.Option(help="Length to which prompts are padded.")] = demo.TEXT_TOKENS,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = STEPS,
    batch: int = 10,
    sheet: Annotated[Path | None, typer.Option(help="Image file for the first images.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    pipe = load(model)
    scenes = held_out_scenes(captions)
    local = clear.linearized(pipe, window, down_factor, weights=weights) if window else contextlib.nullcontext()
    with local:
        images = draw(pipe, scenes, text_tokens, batch, steps)
    for scene, caption, image in zip(scenes, captions_of(scenes), images, strict=True):
        reading = read(image)
        if reading is None or reading.scene != scene:
            print(f"wrong: {caption}; read: {reading.scene.captions[0] if reading else 'unclear'}")
    result = {
        "window": window,
        "down_factor": down_factor,
        "text_tokens": text_tokens,
        "steps": steps,
        **score(scenes, images),
    }
    print(json.dumps(result))
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")
    if sheet:
        contact_sheet({"": list(map(Image.fromarray, images[:SHOWN]))}, captions_of(scenes[:SHOWN])).save(sheet)


if __name__ == "__main__":
    typer.run(main)
