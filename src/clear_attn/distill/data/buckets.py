"""Image sizes of about one area, so that images of any shape are trained on with little cropped."""

from __future__ import annotations

import math

from PIL import Image, ImageOps

# Sides are multiples of a token's 16 px, and of a sixteenth of the resolution where that is more.
LEAST_STEP, STEPS = 16, 16
LARGEST_RATIO = 2.25


def sizes(resolution: int) -> list[tuple[int, int]]:
    """Return heights and widths in pixels, of an area of at most resolution^2, from about 2:1 to 1:2.

    Raises:
        ValueError: the resolution is not a multiple of 16, or too small.
    """
    if resolution < LEAST_STEP or resolution % LEAST_STEP:
        raise ValueError(f"resolution must be a multiple of {LEAST_STEP} pixels, got {resolution}")
    step = max(LEAST_STEP, resolution // STEPS // LEAST_STEP * LEAST_STEP)
    found = {(resolution, resolution)}
    for long in range(resolution + step, 2 * resolution, step):
        short = resolution**2 // long // step * step
        if short and long <= LARGEST_RATIO * short:
            found |= {(long, short), (short, long)}
    return sorted(found)


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """Return an image at the size of the nearest shape, scaled to cover it and cropped at the center."""
    shape = math.log(image.height / image.width)
    height, width = min(
        sizes(resolution), key=lambda size: (abs(math.log(size[0] / size[1]) - shape), -size[0] * size[1])
    )
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
