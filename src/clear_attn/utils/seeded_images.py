"""Run a diffusers pipeline with a seed per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clear_attn.utils.atomic import atomic_file


def generate_with_seeds(pipe: Any, seeds: Iterable[int], **arguments: Any) -> list[Image.Image]:
    """Return a pipeline's images, one per seed.

    Noise is drawn on the CPU with a generator per image, so that it depends on the image's seed alone, not on device
    or batch.

    Args:
        pipe: a diffusers pipeline.
        seeds: one per image of the call.
        arguments: of the pipeline; None leaves its default.
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
    """Save an image per prompt and seed as it is drawn, each file whole or not at all.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompts, seeds, files: one per image; the ending of a file is its format.
        batch_size: images per call.
        progress: wraps the starts of the batches, as tqdm does.
        arguments: of the pipeline; None leaves its default.

    Returns:
        The seconds that each image took: those of its batch, divided by the images in it.
    """
    seconds: list[float] = []
    for start in progress(range(0, len(files), batch_size)):
        batch = slice(start, start + batch_size)
        started = time.perf_counter()
        images = generate_with_seeds(pipe, seeds[batch], prompt=list(prompts[batch]), **arguments)
        seconds += [(time.perf_counter() - started) / len(images)] * len(images)
        for file, image in zip(files[batch], images, strict=True):
            with atomic_file(file) as unfinished:
                image.save(unfinished)
    return seconds
