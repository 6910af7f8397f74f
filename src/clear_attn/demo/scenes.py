"""The small world that the FLUX in the box can draw: one coloured shape at a place on a coloured ground.

A `Scene` is written as a caption, drawn as a picture and read back from one, so that "does the picture
show what the caption says" is a question about pixels with a yes or a no.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# RGB in 0..255, far enough apart that the nearest one names a colour.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 60),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}

# Inside or outside, for x to the right and y downwards in units of the shape's half size.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.36) & (np.maximum(abs(x), abs(y)) <= 1),
}

# The centre (x, y) as a share of the picture's side.
NEAR, MIDDLE, FAR = 0.3, 0.5, 0.7
PLACES: dict[str, tuple[float, float]] = {
    "at the top left": (NEAR, NEAR),
    "at the top right": (FAR, NEAR),
    "in the middle": (MIDDLE, MIDDLE),
    "at the bottom left": (NEAR, FAR),
    "at the bottom right": (FAR, FAR),
}

HELD_OUT = 200


@dataclass(frozen=True)
class Scene:
    colour: str
    shape: str
    ground: str
    place: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} on a {self.ground} ground, {self.place}"


def all_scenes() -> list[Scene]:
    """Every scene whose figure can be told from its ground, in a fixed shuffled order."""
    scenes = [
        Scene(colour, shape, ground, place)
        for colour, shape, ground, place in itertools.product(COLOURS, SHAPES, COLOURS, PLACES)
        if colour != ground
    ]
    random.Random(0).shuffle(scenes)
    return scenes


def held_out_scenes() -> list[Scene]:
    """The scenes that the small FLUX never saw in training."""
    return all_scenes()[:HELD_OUT]


def training_scenes() -> list[Scene]:
    return all_scenes()[HELD_OUT:]


def _covered(shape: str, size: int, centre: tuple[float, float], half: tuple[float, float]) -> np.ndarray:
    """The share of each pixel that the shape covers, `[size, size]` in 0..1, by 3 x 3 samples a pixel."""
    samples = (np.arange(3 * size) + 0.5) / (3 * size)
    x, y = (samples - centre[0]) / half[0], (samples - centre[1]) / half[1]
    inside = np.zeros((3 * size, 3 * size), dtype=np.float32)
    rows, columns = abs(y) <= 1.01, abs(x) <= 1.01
    inside[np.ix_(rows, columns)] = SHAPES[shape](x[None, columns], y[rows, None])
    return inside.reshape(size, 3, size, 3).mean(axis=(1, 3))


def draw(scene: Scene, size: int = 128, *, shift: tuple[float, float] = (0.0, 0.0), half: float = 0.23) -> np.ndarray:
    """Draws a scene.

    Args:
        scene: what to draw.
        size: the side of the picture in pixels.
        shift: how far off its place the figure lies, (x, y) as a share of the side.
        half: half the figure's side, as a share of the picture's.

    Returns:
        uint8 array `[size, size, 3]`.
    """
    x, y = PLACES[scene.place]
    covered = _covered(scene.shape, size, (x + shift[0], y + shift[1]), (half, half))[..., None]
    picture = covered * np.array(COLOURS[scene.colour]) + (1 - covered) * np.array(COLOURS[scene.ground])
    return picture.round().astype(np.uint8)


def _nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def read(picture: np.ndarray) -> Scene | None:
    """Reads the scene that a picture shows, or None where it shows none clearly.

    The ground is the median of the picture's border; the figure is what lies nearer to the colour that
    differs most from it; its shape is the one that overlaps it best (intersection over union, at least
    0.8) when drawn into its bounding box; its place is the nearest one to the box's centre.

    Args:
        picture: uint8 array `[size, size, 3]`.
    """
    pixels = np.asarray(picture).astype(np.float32)
    size = pixels.shape[0]
    border = max(1, size // 40)
    frame = np.ones((size, size), dtype=bool)
    frame[border:-border, border:-border] = False
    ground = np.median(pixels[frame], axis=0)
    difference = np.linalg.norm(pixels - ground, axis=-1)
    strong = difference > max(60.0, float(difference.max()) / 2)
    if strong.sum() < 0.01 * size**2:
        return None
    colour = np.median(pixels[strong], axis=0)
    figure = np.linalg.norm(pixels - colour, axis=-1) < difference
    # A box that ignores single stray pixels: the figure has at least three in each of its rows.
    rows, columns = (np.flatnonzero(figure.sum(axis=axis) >= max(2, size // 64)) for axis in (1, 0))
    if len(rows) == 0 or len(columns) == 0:
        return None
    (top, bottom), (left, right) = ((line[0] / size, (line[-1] + 1) / size) for line in (rows, columns))
    centre, half = ((left + right) / 2, (top + bottom) / 2), ((right - left) / 2, (bottom - top) / 2)

    def overlap(shape: str) -> float:
        drawn = _covered(shape, size, centre, half) > 0.5
        return float((drawn & figure).sum() / (drawn | figure).sum())

    shape = max(SHAPES, key=overlap)
    if overlap(shape) < 0.8 or max(half) > 1.3 * min(half):
        return None
    place = min(PLACES, key=lambda name: float(np.hypot(*(np.array(PLACES[name]) - centre))))
    return Scene(_nearest_colour(colour), shape, _nearest_colour(ground), place)
