"""Run a diffusers pipeline with a seed per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clear_attn.utils.atomic import atomic_file

# The name of a PNG file's text entry.
SECONDS = "seconds"


def generate_with_seeds(pipe: Any, seeds: Iterable[int], **arguments: Any) -> list[Image.Image]:
    """Return an image per seed.

    Each image has its own generator on the CPU, so that its noise depends only on its seed, not on device or batch.

    Args:
        pipe: a diffusers pipeline, or a function that is called like one.
        seeds: one per image.
        arguments: arguments of the pipeline; None means its default.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    images: list[Image.Image] = pipe(generator=[torch.Generator().manual_seed(seed) for seed in seeds], **given).images
    return images


def save_images_with_seeds(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    files: Sequence[Path],
    *,
    batch_size: int,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
    **arguments: Any,
) -> list[float]:
    """Generate an image per prompt and seed, and save each atomically when it is finished.

    Batches that were saved before are not generated again.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompts, seeds, files: one per image; the files are `.png`, and have the seconds of the image.
        batch_size: the number of images per call.
        progress: a wrapper of the loop over batches, such as tqdm.
        arguments: arguments of the pipeline; None means its default.

    Returns:
        The seconds of each image: those of its batch divided by the images in it.
    """
    seconds: list[float] = []
    for start in progress(range(0, len(files), batch_size)):
        batch = slice(start, start + batch_size)
        if not all(file.exists() for file in files[batch]):
            started = time.perf_counter()
            images = generate_with_seeds(pipe, seeds[batch], prompt=list(prompts[batch]), **arguments)
            taken = PngInfo()
            taken.add_text(SECONDS, repr((time.perf_counter() - started) / len(images)))
            for file, image in zip(files[batch], images, strict=True):
                with atomic_file(file) as unfinished:
                    image.save(unfinished, pnginfo=taken)
        seconds += map(seconds_of, files[batch])
    return seconds


def seconds_of(file: Path) -> float:
    """Return the seconds of an image that `save_images_with_seeds` saved."""
    with Image.open(file) as image:
        return float(image.info[SECONDS])
