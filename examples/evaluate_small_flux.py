"""Count the held-out captions that a FLUX of 32 x 32 tokens draws right, and measure how well its shapes fit.

    python examples/evaluate_composition_flux.py --model composition-flux/phase-2 --output result.json

Each caption has its own seed, so that the result does not depend on the batch. Captions alternate between the wordings
of a scene.
"""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import FluxPipeline
from PIL import Image

import clear_attn as clear
from clear_attn.demo.composition_reader import Reading, read
from clear_attn.demo.compositions import SIZE, Scene, held_out_scenes
from clear_attn.models._diffusers import load_pretrained


def caption_of(scene: Scene, number: int) -> str:
    return scene.captions[number % len(scene.captions)]


def draw(pipe: FluxPipeline, scenes: list[Scene], text_tokens: int, steps: int, batch: int) -> list[np.ndarray]:
    """Return an image for each scene, uint8 `[SIZE, SIZE, 3]`."""
    images: list[np.ndarray] = []
    for first in range(0, len(scenes), batch):
        numbers = range(first, min(first + batch, len(scenes)))
        drawn = pipe(
            [caption_of(scenes[number], number) for number in numbers],
            height=SIZE,
            width=SIZE,
            max_sequence_length=text_tokens,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(number) for number in numbers],
        )
        images += [np.asarray(image) for image in drawn.images]
    return images


def score(scenes: list[Scene], readings: list[Reading | None]) -> dict[str, float]:
    """Return the number of images that show their scene, and parts of it, and the median overlap of their shapes."""
    pairs = [(scene, reading.scene) for scene, reading in zip(scenes, readings, strict=True) if reading]
    same = [(ours, theirs) for ours, theirs in pairs if len(ours.figures) == len(theirs.figures)]

    def figures(part) -> int:
        return sum(all(map(lambda a, b: part(a) == part(b), one.figures, other.figures)) for one, other in same)

    overlaps = [overlap for reading in readings if reading for overlap in reading.overlaps]
    return {
        "captions": len(scenes),
        "clear": len(pairs),
        "right": sum(one == other for one, other in pairs),
        "layout": sum(one.layout == other.layout for one, other in pairs),
        "ground": sum(one.ground == other.ground for one, other in pairs),
        "shapes": figures(lambda figure: figure.shape),
        "colors": figures(lambda figure: figure.surface.color),
        "surfaces": figures(lambda figure: figure.surface),
        "median_overlap": round(float(np.median(overlaps)), 4) if overlaps else 0.0,
    }


def main(
    model: Annotated[Path, typer.Option(help="Folder of the pipeline.")],
    window: Annotated[int | None, typer.Option(help="Radius in tokens; dense without it.")] = None,
    down_factor: Annotated[int, typer.Option(help="Of the pooled keys and values.")] = 1,
    weights: Annotated[Path | None, typer.Option(help="Distilled weights; none: the model's own.")] = None,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 200,
    text_tokens: Annotated[int, typer.Option(help="Length to which prompts are padded.")] = 32,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    batch: int = 10,
    sheet: Annotated[Path | None, typer.Option(help="Image file for the first 16 images, in four columns.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    pipe = load_pretrained(FluxPipeline, model, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(captions)
    local = clear.linearized(pipe, window, down_factor, weights=weights) if window else contextlib.nullcontext()
    with local:
        images = draw(pipe, scenes, text_tokens, steps, batch)
    readings = [read(image) for image in images]
    for number, (scene, reading) in enumerate(zip(scenes, readings, strict=True)):
        if reading is None or reading.scene != scene:
            print(f"wrong: {caption_of(scene, number)}; read: {reading.scene.captions[0] if reading else 'unclear'}")
    result = {"window": window, "down_factor": down_factor, "text_tokens": text_tokens, **score(scenes, readings)}
    print(json.dumps(result))
    if sheet:
        rows = [np.concatenate(images[first : first + 4], axis=1) for first in range(0, min(16, captions - 3), 4)]
        Image.fromarray(np.concatenate(rows)).save(sheet)
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
