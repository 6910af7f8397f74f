"""What the small FLUX can draw: one colored shape at a place on a colored ground.

A `Scene` has a caption, can be drawn as an image and recognized in one, so that whether an image shows what its caption
says is a check of pixels.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# RGB in 0..255, far enough apart to name a color by the nearest one.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 60),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}

# Whether a point is inside, for x to the right and y downwards in units of the shape's half size.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.36) & (np.maximum(abs(x), abs(y)) <= 1),
}

# The center (x, y) as a share of the image's side.
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
    """A shape of a color at a place on a ground of another color.

    Examples:
        >>> Scene("red", "circle", "blue", "in the middle").caption
        'a red circle on a blue ground, in the middle'
    """

    color: str
    shape: str
    ground: str
    place: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} on a {self.ground} ground, {self.place}"


def all_scenes() -> list[Scene]:
    """Return every scene whose shape and ground differ in color, in a fixed shuffled order."""
    scenes = [
        Scene(color, shape, ground, place)
        for color, shape, ground, place in itertools.product(COLORS, SHAPES, COLORS, PLACES)
        if color != ground
    ]
    random.Random(0).shuffle(scenes)
    return scenes


def held_out_scenes() -> list[Scene]:
    """Return the scenes that the small FLUX was not trained on."""
    return all_scenes()[:HELD_OUT]


def training_scenes() -> list[Scene]:
    """Return the scenes that the small FLUX was trained on."""
    return all_scenes()[HELD_OUT:]


def _covered(shape: str, size: int, center: tuple[float, float], half: tuple[float, float]) -> np.ndarray:
    """Return the share of each pixel that the shape covers, `[size, size]` in 0..1, by 3 x 3 samples per pixel."""
    samples = (np.arange(3 * size) + 0.5) / (3 * size)
    x, y = (samples - center[0]) / half[0], (samples - center[1]) / half[1]
    inside = np.zeros((3 * size, 3 * size), dtype=np.float32)
    rows, columns = abs(y) <= 1.01, abs(x) <= 1.01
    inside[np.ix_(rows, columns)] = SHAPES[shape](x[None, columns], y[rows, None])
    return inside.reshape(size, 3, size, 3).mean(axis=(1, 3))


def draw(scene: Scene, size: int = 128, *, shift: tuple[float, float] = (0.0, 0.0), half: float = 0.23) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: the side of the image in pixels.
        shift: how far the shape is from its place, (x, y) as a share of the side.
        half: half the side of the shape, as a share of the image's.

    Returns:
        uint8 array `[size, size, 3]`.

    Examples:
        >>> scene = Scene("red", "circle", "blue", "in the middle")
        >>> read(draw(scene)) == scene
        True
    """
    x, y = PLACES[scene.place]
    covered = _covered(scene.shape, size, (x + shift[0], y + shift[1]), (half, half))[..., None]
    image = covered * np.array(COLORS[scene.color]) + (1 - covered) * np.array(COLORS[scene.ground])
    return image.round().astype(np.uint8)


def _nearest_color(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLORS[name]))))


def read(image: np.ndarray) -> Scene | None:
    """Recognize the scene that an image shows, or return None if it shows none clearly.

    The ground is the median of the image's border. The figure is what is nearer to the color that differs most from
    it. Its shape is the one that overlaps it best (intersection over union, at least 0.8) when drawn into its bounding
    box, and its place the nearest one to the box's center.

    Args:
        image: uint8 array `[size, size, 3]`.
    """
    pixels = np.asarray(image).astype(np.float32)
    size = pixels.shape[0]
    border = max(1, size // 40)
    frame = np.ones((size, size), dtype=bool)
    frame[border:-border, border:-border] = False
    ground = np.median(pixels[frame], axis=0)
    difference = np.linalg.norm(pixels - ground, axis=-1)
    strong = difference > max(60.0, float(difference.max()) / 2)
    if strong.sum() < 0.01 * size**2:
        return None
    color = np.median(pixels[strong], axis=0)
    figure = np.linalg.norm(pixels - color, axis=-1) < difference
    # Single stray pixels are outside the box: the figure has at least two pixels in each of its rows.
    rows, columns = (np.flatnonzero(figure.sum(axis=axis) >= max(2, size // 64)) for axis in (1, 0))
    if len(rows) == 0 or len(columns) == 0:
        return None
    (top, bottom), (left, right) = ((line[0] / size, (line[-1] + 1) / size) for line in (rows, columns))
    center, half = ((left + right) / 2, (top + bottom) / 2), ((right - left) / 2, (bottom - top) / 2)

    def overlap(shape: str) -> float:
        drawn = _covered(shape, size, center, half) > 0.5
        return float((drawn & figure).sum() / (drawn | figure).sum())

    shape = max(SHAPES, key=overlap)
    if overlap(shape) < 0.8 or max(half) > 1.3 * min(half):
        return None
    place = min(PLACES, key=lambda name: float(np.hypot(*(np.array(PLACES[name]) - center))))
    return Scene(_nearest_color(color), shape, _nearest_color(ground), place)
