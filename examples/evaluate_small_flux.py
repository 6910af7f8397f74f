"""Count the held-out captions that the small FLUX draws right, by a check of the pixels.

    python examples/evaluate_small_flux.py --output benchmarks/results/small_flux.json

Each caption has its own seed, so that the result does not depend on the batch.
"""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import FluxPipeline

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo.scenes import Scene, held_out_scenes, read
from clear_attn.models._diffusers import load_pretrained

PARTS = ("color", "ground", "shape", "place")


def draw(pipe: FluxPipeline, scenes: list[Scene], text_tokens: int, batch: int) -> list[np.ndarray]:
    """Return an image for each scene, uint8 `[SIZE, SIZE, 3]`."""
    images: list[np.ndarray] = []
    for first in range(0, len(scenes), batch):
        part = scenes[first : first + batch]
        drawn = pipe(
            [scene.caption for scene in part],
            height=demo.SIZE,
            width=demo.SIZE,
            max_sequence_length=text_tokens,
            generator=[torch.Generator().manual_seed(first + number) for number in range(len(part))],
        )
        images += [np.asarray(image) for image in drawn.images]
    return images


def count_right(scenes: list[Scene], images: list[np.ndarray]) -> dict[str, int]:
    """Return the number of images that show their scene, and that show each part of it."""
    found = [read(image) for image in images]
    pairs = list(zip(scenes, found, strict=True))
    return {
        "captions": len(scenes),
        "right": sum(scene == shown for scene, shown in pairs),
        **{
            part: sum(shown is not None and getattr(scene, part) == getattr(shown, part) for scene, shown in pairs)
            for part in PARTS
        },
    }


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the pipeline; default: the one in the package.")] = None,
    window: Annotated[int | None, typer.Option(help="Radius in tokens; dense without it.")] = None,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 200,
    text_tokens: Annotated[int, typer.Option(help="Length to which prompts are padded.")] = demo.TEXT_TOKENS,
    batch: int = 50,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    pipe = load_pretrained(FluxPipeline, model or demo.path(), dtype=torch.float32, local_files_only=True)
    scenes = held_out_scenes()[:captions]
    with clear.linearized(pipe, window, weights=None) if window else contextlib.nullcontext():
        counts = count_right(scenes, draw(pipe, scenes, text_tokens, batch))
    result = {"window": window, "text_tokens": text_tokens, **counts}
    print(json.dumps(result))
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
