"""What the small FLUX can draw: one to three figures, placed relative to each other, some textured.

A `Scene` has captions and can be drawn. `clear_attn.demo.scene_reader` recognizes scenes in images, so that whether an
image shows what its caption says is a check of pixels.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SIZE = 256  # pixels; the size that the small FLUX was trained at, 32 x 32 tokens

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

# How a caption names a surface of two colors.
TEXTURES = {"stripes": "with {} stripes", "dots": "with {} dots", "gradient": "fading to {}"}
ACCENTS = ("white", "black")

# Share of the image's side after which stripes and dots repeat: one token, so that all tokens of a surface are alike.
PITCH = 1 / 32
DOT_RADIUS = 0.32  # as a share of the pitch
STRIPE = (-0.25, 0.125)  # from edge to edge, as shares of the pitch; whole pixels, and narrower than the gaps
FADED = 0.8  # a gradient ends with this share of its accent

# The centers (x, y) of the figures as shares of the image's side, by layout.
NEAR, MIDDLE, FAR = 0.27, 0.5, 0.73
LAYOUTS: dict[str, tuple[tuple[float, float], ...]] = {
    "at the top left": ((NEAR, NEAR),),
    "at the top right": ((FAR, NEAR),),
    "in the middle": ((MIDDLE, MIDDLE),),
    "at the bottom left": ((NEAR, FAR),),
    "at the bottom right": ((FAR, FAR),),
    "row": ((NEAR, MIDDLE), (FAR, MIDDLE)),
    "column": ((MIDDLE, NEAR), (MIDDLE, FAR)),
    "two above one": ((NEAR, NEAR), (FAR, NEAR), (MIDDLE, FAR)),
    "two below one": ((NEAR, FAR), (FAR, FAR), (MIDDLE, NEAR)),
}
HALF_SIDES = {1: 0.21, 2: 0.19, 3: 0.17}  # half the side of each figure, by the number of figures
JITTER = 0.01  # largest shift, and largest change of the half side

# The share of the scenes that are never trained on is one in this number.
HELD_OUT_SHARE = 10


@dataclass(frozen=True)
class Surface:
    """A color, or a texture of a color and an accent.

    Examples:
        >>> f"a circle {Surface('red', 'stripes', 'white').texture_phrase}"
        'a circle with white stripes'
    """

    color: str
    texture: str | None = None
    accent: str | None = None

    @property
    def texture_phrase(self) -> str:
        return TEXTURES[self.texture].format(self.accent) if self.texture else ""

    @property
    def colors(self) -> set[str]:
        return {self.color} | ({self.accent} if self.accent else set())

    def describe(self, noun: str) -> str:
        return " ".join(filter(None, ("a", self.color, noun, self.texture_phrase)))


@dataclass(frozen=True)
class Figure:
    shape: str
    surface: Surface

    def __str__(self) -> str:
        return self.surface.describe(self.shape)


@dataclass(frozen=True)
class Scene:
    """Figures in a layout on a ground. The figures are in the order of the layout's centers.

    Examples:
        >>> circle, square = Figure("circle", Surface("red")), Figure("square", Surface("blue"))
        >>> scene = Scene((circle, square), "row", Surface("yellow", "dots", "white"))
        >>> for caption in scene.captions:
        ...     print(caption)
        a red circle left of a blue square, on a yellow ground with white dots
        a blue square right of a red circle, on a yellow ground with white dots
    """

    figures: tuple[Figure, ...]
    layout: str
    ground: Surface

    @property
    def captions(self) -> tuple[str, ...]:
        """All wordings. Those of two or three figures name the first pair in either order."""
        ground = f"on {self.ground.describe('ground')}"
        if len(self.figures) == 1:
            return (f"{self.figures[0]} {ground}, {self.layout}",)
        first, second, *last = self.figures
        there, back = ("above", "below") if self.layout == "column" else ("left of", "right of")
        rest = f", both {self.layout.split()[1]} {last[0]}, {ground}" if last else f", {ground}"
        return f"{first} {there} {second}{rest}", f"{second} {back} {first}{rest}"

    @property
    def surfaces(self) -> tuple[Surface, ...]:
        return (self.ground, *(figure.surface for figure in self.figures))

    @property
    def held_out(self) -> bool:
        """Whether the small FLUX was not trained on this scene, in any wording."""
        return zlib.crc32(self.captions[0].encode()) % HELD_OUT_SHARE == 0


def has_no_texture(scene: Scene) -> bool:
    """Return whether all surfaces of a scene have one color."""
    return not any(surface.texture for surface in scene.surfaces)


def has_gradient(scene: Scene) -> bool:
    """Return whether a surface of a scene fades."""
    return any(surface.texture == "gradient" for surface in scene.surfaces)


class Pose(NamedTuple):
    """The center and half the side of a figure, as shares of the image's side."""

    x: float
    y: float
    half: float


def poses(scene: Scene, rng: np.random.Generator | None = None) -> list[Pose]:
    """Return the pose of each figure, with random jitter if there is a generator."""
    nominal = [Pose(x, y, HALF_SIDES[len(scene.figures)]) for x, y in LAYOUTS[scene.layout]]
    return [Pose(*(pose + rng.uniform(-JITTER, JITTER, 3))) for pose in nominal] if rng else nominal


@functools.cache
def _surfaces(textured: bool) -> tuple[Surface, ...]:
    """Return all surfaces of one kind."""
    if not textured:
        return tuple(map(Surface, COLORS))
    pairs = [(color, accent) for color in COLORS for accent in ACCENTS if accent != color]
    return tuple(Surface(color, texture, accent) for (color, accent), texture in itertools.product(pairs, TEXTURES))


def random_surface(rng: np.random.Generator, textured: bool, without: Set[str] = frozenset()) -> Surface:
    """Return a surface of none of the colors `without`: a plain one if they leave no textured one."""
    fitting = [surface for surface in _surfaces(textured) if not surface.colors & without]
    return fitting[rng.integers(len(fitting))] if fitting else random_surface(rng, False, without)


def random_scene(rng: np.random.Generator) -> Scene:
    """Return a scene. No figure shares a color with the ground, and of three figures at most one is textured."""
    count = int(rng.choice([1, 2, 3], p=[0.25, 0.4, 0.35]))
    layouts = [name for name, centers in LAYOUTS.items() if len(centers) == count]
    ground = random_surface(rng, rng.random() < 0.4)
    textured = rng.random(count) < 0.35
    if count == 3:
        textured &= np.arange(3) == rng.integers(3)
    shapes = [list(SHAPES)[index] for index in rng.integers(len(SHAPES), size=count)]
    surfaces = [random_surface(rng, bool(each), ground.colors) for each in textured]
    figures = tuple(map(Figure, shapes, surfaces))
    return Scene(figures, layouts[rng.integers(len(layouts))], ground)


def _scenes(seed: int, held_out: bool) -> Iterator[Scene]:
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng)
        if scene.held_out == held_out:
            yield scene


def training_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return random scenes of those that are trained on."""
    scenes = _scenes(seed, held_out=False)
    return [next(scenes) for _ in range(count)]


def held_out_scenes(count: int = 200) -> list[Scene]:
    """Return different scenes of those that are not trained on, always in the same order."""
    scenes, chosen = _scenes(0, held_out=True), dict[Scene, None]()
    while len(chosen) < count:
        chosen[next(scenes)] = None
    return list(chosen)


def coverage(shape: str, size: int, pose: Pose) -> np.ndarray:
    """Return the share of each pixel that the shape covers, `[size, size]` in 0..1, by 3 x 3 samples per pixel."""
    covered = np.zeros((size, size), dtype=np.float32)
    low = [max(0, int((center - pose.half) * size) - 1) for center in pose[:2]]
    high = [min(size, int((center + pose.half) * size) + 2) for center in pose[:2]]
    x, y = (
        ((np.arange(3 * start, 3 * stop) + 0.5) / (3 * size) - center) / pose.half
        for start, stop, center in zip(low, high, pose[:2], strict=True)
    )
    if len(x) and len(y):
        inside = SHAPES[shape](x[None, :], y[:, None]).astype(np.float32)
        covered[low[1] : high[1], low[0] : high[0]] = inside.reshape(len(y) // 3, 3, len(x) // 3, 3).mean(axis=(1, 3))
    return covered


@functools.cache
def _accent_share(texture: str, size: int) -> np.ndarray:
    """Return the share of each pixel that the accent of stripes or dots covers, `[size, size]`."""
    phase = (np.arange(4 * size) + 0.5) / (4 * size) / PITCH % 1 - 0.5
    x, y = phase[None, :], phase[:, None]
    inside = (y >= STRIPE[0]) & (y < STRIPE[1]) if texture == "stripes" else np.hypot(x, y) < DOT_RADIUS
    return np.broadcast_to(inside, (4 * size, 4 * size)).astype(np.float32).reshape(size, 4, size, 4).mean(axis=(1, 3))


def paint(surface: Surface, size: int, top: float, bottom: float) -> np.ndarray:
    """Return a whole image of a surface, `[size, size, 3]` in 0..255; a gradient runs from top to bottom."""
    color = np.array(COLORS[surface.color], dtype=np.float32)
    if surface.texture is None or surface.accent is None:
        return np.broadcast_to(color, (size, size, 3))
    if surface.texture == "gradient":
        rows = (np.arange(size) + 0.5) / size
        share = FADED * np.clip((rows - top) / (bottom - top), 0, 1).astype(np.float32)[:, None]
    else:
        share = _accent_share(surface.texture, size)
    return np.asarray(color + share[..., None] * (np.array(COLORS[surface.accent], dtype=np.float32) - color))


def draw(scene: Scene, size: int = SIZE, posed: Sequence[Pose] | None = None) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: the side of the image in pixels.
        posed: the pose of each figure, by default the layout's.

    Returns:
        uint8 array `[size, size, 3]`.

    Examples:
        >>> from clear_attn.demo.scene_reader import read
        >>> scene = held_out_scenes(1)[0]
        >>> read(draw(scene)).scene == scene
        True
    """
    image = paint(scene.ground, size, 0, 1)
    for figure, pose in zip(scene.figures, posed or poses(scene), strict=True):
        covered = coverage(figure.shape, size, pose)[..., None]
        surface = paint(figure.surface, size, pose.y - pose.half, pose.y + pose.half)
        image = image + covered * (surface - image)
    return image.round().astype(np.uint8)
