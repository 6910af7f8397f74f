"""Run a diffusers pipeline with a seed per image."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image


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
