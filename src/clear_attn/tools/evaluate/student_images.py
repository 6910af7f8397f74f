"""Pictures of prompts, drawn into a folder, and read again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from clear_attn.utils.seeded_images import generate_with_seeds


class Drawing(NamedTuple):
    """How pictures are drawn; names as in diffusers, None for the pipeline's own.

    Attributes:
        height, width: in pixels.
        seed: of the first picture's noise; the next picture has the next seed.
        batch_size: pictures at a time.
    """

    height: int
    width: int
    seed: int
    num_inference_steps: int | None
    guidance_scale: float | None
    max_sequence_length: int | None
    batch_size: int


class Drawn(NamedTuple):
    """Pictures and the time they took.

    Attributes:
        files: one for each prompt.
        seconds: of each batch.
    """

    files: list[Path]
    seconds: list[float]


def draw(pipe: Any, prompts: Sequence[str], drawing: Drawing, folder: Path) -> Drawn:
    """Draws a picture for each prompt into a new folder, as lossless PNG."""
    folder.mkdir(parents=True)
    files, seconds = [], []
    with tqdm(total=len(prompts), desc=folder.name, unit="picture") as progress:
        for start in range(0, len(prompts), drawing.batch_size):
            batch = list(prompts[start : start + drawing.batch_size])
            seeds = range(drawing.seed + start, drawing.seed + start + len(batch))
            started = time.perf_counter()
            images = generate_with_seeds(
                pipe,
                seeds,
                prompt=batch,
                height=drawing.height,
                width=drawing.width,
                num_inference_steps=drawing.num_inference_steps,
                guidance_scale=drawing.guidance_scale,
                max_sequence_length=drawing.max_sequence_length,
            )
            seconds.append(time.perf_counter() - started)
            for number, image in enumerate(images, start):
                files.append(folder / f"{number:05}.png")
                image.save(files[-1])
            progress.update(len(batch))
    return Drawn(files, seconds)


def read(file: Path) -> Image.Image:
    """A picture from its file."""
    with Image.open(file) as image:
        return image.convert("RGB")


def read_all(files: Sequence[Path]) -> Tensor:
    """Pictures of one size: uint8 `[pictures, 3, height, width]`, on the CPU."""
    return torch.stack([torch.from_numpy(np.array(read(file))).movedim(-1, 0) for file in files])
