"""Image sizes with about the same area, so that images of any shape need little cropping."""

from __future__ import annotations

import math

from PIL import Image, ImageOps

# Sides are multiples of the model's own step, or of a sixteenth of the resolution if that is larger.
LEAST_STEP, STEPS = 16, 16
LARGEST_RATIO = 2.25


def sizes(resolution: int, least_step: int = LEAST_STEP) -> list[tuple[int, int]]:
    """Return (height, width) pairs in pixels with an area of at most resolution^2, from about 2:1 to 1:2.

    Sides are multiples of `least_step`.

    Raises:
        ValueError: the resolution is no multiple of it, or too small.
    """
    if resolution < least_step or resolution % least_step:
        raise ValueError(f"resolution must be a multiple of {least_step} pixels, got {resolution}")
    step = max(least_step, resolution // STEPS // least_step * least_step)
    found = {(resolution, resolution)}
    for long in range(resolution + step, 2 * resolution, step):
        short = resolution**2 // long // step * step
        if short and long <= LARGEST_RATIO * short:
            found |= {(long, short), (short, long)}
    return sorted(found)


def fit(image: Image.Image, resolution: int, least_step: int = LEAST_STEP) -> Image.Image:
    """Scale an image to cover the size with the nearest aspect ratio, and crop its center to that size."""
    shape = math.log(image.height / image.width)
    height, width = min(
        sizes(resolution, least_step), key=lambda size: (abs(math.log(size[0] / size[1]) - shape), -size[0] * size[1])
    )
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
