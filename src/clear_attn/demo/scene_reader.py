"""Recognize the scenes of `clear_attn.demo.scenes` in images of any size, by their pixels alone."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

from clear_attn.demo.scenes import (
    ACCENTS,
    COLORS,
    HALF_SIDES,
    LAYOUTS,
    SHAPES,
    Figure,
    Pose,
    Scene,
    Surface,
    coverage,
)

# Distances between RGB colors in 0..255; the nearest two of COLORS are 148 apart.
FIGURE_CONTRAST = 45.0  # of a pixel that starts a figure
CLEAR_COLOR = 40.0  # the largest mean distance of a surface from its colors
STRAY_AREA = 0.002  # a spot below this share of the image is no figure
STRAY_TOTAL = 0.01  # of all such spots together
LEAST_OVERLAP = 0.8  # of a shape
LEAST_REPEATS = 3  # of stripes or dots
PLACE_TOLERANCE = 0.1
SIDE_TOLERANCE = 0.25  # as a share of the nominal side


class Reading(NamedTuple):
    """A recognized scene, and how well each figure's pixels overlap its ideal shape (intersection over union)."""

    scene: Scene
    poses: tuple[Pose, ...]
    overlaps: tuple[float, ...]


def read(image: np.ndarray) -> Reading | None:
    """Recognize the scene that an image shows, or return None if it shows none clearly.

    The ground is recognized in the image's border, and figures are connected regions that differ from it. A figure's
    shape is the one that overlaps it best when drawn with its area at its centroid.

    Args:
        image: uint8 array `[size, size, 3]`.
    """
    pixels = np.asarray(image).astype(np.float32)
    size = pixels.shape[0]
    border = max(2, size // 32)
    frame = np.ones((size, size), dtype=bool)
    frame[border:-border, border:-border] = False
    ground = recognize_surface(pixels, frame)
    if ground is None:
        return None
    from_ground = distance_from(pixels, ground)
    spots = connected_regions(from_ground > FIGURE_CONTRAST)
    large = [spot for spot in spots if spot.mean() >= STRAY_AREA]
    if sum(spot.mean() for spot in spots) - sum(spot.mean() for spot in large) > STRAY_TOTAL:
        return None
    found = [recognize_figure(pixels, spot, from_ground) for spot in large]
    known = [each for each in found if each is not None]
    if not known or len(known) < len(found) or len(found) > max(HALF_SIDES):
        return None
    placed = recognize_layout([each.pose for each in known])
    covered = functools.reduce(np.logical_or, (grow(spot, border // 2) for spot in large))
    if placed is None or recognize_surface(pixels, ~covered) != ground:
        return None
    layout, order = placed
    ordered = [known[index] for index in order]
    scene = Scene(tuple(each.figure for each in ordered), layout, ground)
    return Reading(scene, tuple(each.pose for each in ordered), tuple(each.overlap for each in ordered))


def count_figures(image: np.ndarray, ground: Surface) -> int:
    """Return the number of figures in an image on a known ground, also of an image that shows no scene clearly.

    Args:
        image: uint8 array `[size, size, 3]`.
        ground: the surface around the figures.
    """
    from_ground = distance_from(np.asarray(image).astype(np.float32), ground)
    return sum(bool(spot.mean() >= STRAY_AREA) for spot in connected_regions(from_ground > FIGURE_CONTRAST))


class FoundFigure(NamedTuple):
    figure: Figure
    pose: Pose
    overlap: float


def recognize_figure(pixels: np.ndarray, spot: np.ndarray, from_ground: np.ndarray) -> FoundFigure | None:
    """Return the figure at a spot, or None if it has no clear shape or surface."""
    surface = recognize_surface(pixels, shrink(spot, max(1, spot.shape[0] // 100)))
    if surface is None:
        return None
    # A pixel at the edge belongs to the nearer one of figure and ground.
    region = grow(spot, 2) & (distance_from(pixels, surface) < from_ground)
    fits = [(*fit_shape(shape, region), shape) for shape in SHAPES]
    overlap, pose, shape = max(fits)
    return FoundFigure(Figure(shape, surface), pose, overlap) if overlap >= LEAST_OVERLAP else None


@functools.cache
def _area_and_centroid(shape: str) -> tuple[float, float]:
    """Return the area and the centroid's y of a shape with a half side of 1."""
    axis = (np.arange(1000) + 0.5) / 500 - 1
    inside = SHAPES[shape](axis[None, :], axis[:, None])
    return float(inside.mean() * 4), float((inside * axis[:, None]).sum() / inside.sum())


def fit_shape(shape: str, region: np.ndarray) -> tuple[float, Pose]:
    """Return how well a region overlaps a shape of the same area and centroid, and the shape's pose."""
    size = region.shape[0]
    rows, columns = np.nonzero(region)
    if len(rows) == 0:
        return 0.0, Pose(0.5, 0.5, 0.0)
    area, centroid = _area_and_centroid(shape)
    half = (len(rows) / area) ** 0.5
    pose = Pose((columns.mean() + 0.5) / size, (rows.mean() + 0.5 - centroid * half) / size, half / size)
    ideal = coverage(shape, size, pose) > 0.5
    return float((ideal & region).sum() / (ideal | region).sum()), pose


def recognize_layout(found: list[Pose]) -> tuple[str, tuple[int, ...]] | None:
    """Return the layout of figures and which of them is at each of its centers, or None if they fit none."""

    def error(layout: str, order: tuple[int, ...]) -> float:
        centers = LAYOUTS[layout]
        return max(np.hypot(found[i].x - x, found[i].y - y).item() for i, (x, y) in zip(order, centers, strict=True))

    nominal = HALF_SIDES[len(found)]
    if any(abs(pose.half - nominal) > SIDE_TOLERANCE * nominal for pose in found):
        return None
    orders = list(itertools.permutations(range(len(found))))
    candidates = [
        (error(layout, order), layout, order)
        for layout in LAYOUTS
        if len(LAYOUTS[layout]) == len(found)
        for order in orders
    ]
    least, layout, order = min(candidates)
    return (layout, order) if least <= PLACE_TOLERANCE else None


def _project(pixels: np.ndarray, color: str, accent: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of the accent in each pixel, in 0..1, and the pixel's distance from that mixture."""
    start, end = (np.array(COLORS[name], dtype=np.float32) for name in (color, accent))
    direction = end - start
    share = np.clip((pixels - start) @ direction / (direction @ direction), 0, 1)
    return share, np.linalg.norm(pixels - (start + share[..., None] * direction), axis=-1)


def distance_from(pixels: np.ndarray, surface: Surface) -> np.ndarray:
    """Return the distance of each pixel from the surface's color, or from the nearest mixture of its two."""
    if surface.accent is None:
        return np.linalg.norm(pixels - np.array(COLORS[surface.color], dtype=np.float32), axis=-1)
    return _project(pixels, surface.color, surface.accent)[1]


def recognize_surface(pixels: np.ndarray, region: np.ndarray) -> Surface | None:
    """Return the surface that a region of an image shows, or None if it shows none clearly.

    Args:
        pixels: `[size, size, 3]` in 0..255.
        region: boolean, `[size, size]`.
    """
    chosen = pixels[region]
    if len(chosen) < 16:
        return None
    plain = min(COLORS, key=lambda name: distance_from(chosen, Surface(name)).mean())
    if distance_from(chosen, Surface(plain)).mean() <= CLEAR_COLOR / 2:
        return Surface(plain)
    pairs = [(color, accent) for color in COLORS for accent in ACCENTS if color != accent]
    errors = [_project(chosen, *pair)[1].mean() for pair in pairs]
    if min(errors) > CLEAR_COLOR / 2:
        return Surface(plain) if distance_from(chosen, Surface(plain)).mean() <= CLEAR_COLOR else None
    # Black with white and white with black differ in which one there is more of, or at the top.
    near = [pair for pair, error in zip(pairs, errors, strict=True) if error <= min(errors) + 1]
    textures = [(recognize_texture(_project(pixels, *pair)[0], region), pair) for pair in near]
    known = [Surface(color, texture, accent) for texture, (color, accent) in textures if texture]
    return known[0] if len(known) == 1 else None


def recognize_texture(share: np.ndarray, region: np.ndarray) -> str | None:
    """Return the texture of a region by the share of the accent in each pixel, or None if it is none clearly.

    Stripes vary from row to row, a gradient slowly so; dots vary along both axes. The accent covers less than half.
    """
    mean, total = share[region].mean(), share[region].var()
    rows, columns = (_line_means(share, region, axis) for axis in (1, 0))
    if total == 0 or min(len(rows[0]), len(columns[0])) < 2:
        return None
    by_rows, by_columns = (
        float((counts * (means - mean) ** 2).sum() / counts.sum() / total) for means, counts in (rows, columns)
    )
    position = np.linspace(0, 1, len(rows[0]))
    slope, start = np.polyfit(position, rows[0], 1)
    if by_rows > 0.7 and np.corrcoef(position, rows[0])[0, 1] ** 2 > 0.85:
        return "gradient" if slope > 0.4 and start < 0.3 else None
    if not 0.15 < mean < 0.48 or not _repeats(rows[0]):
        return None
    if by_rows > 0.6 and by_columns < 0.2:
        return "stripes"
    return "dots" if max(by_rows, by_columns) < 0.6 and _repeats(columns[0]) else None


def _repeats(line: np.ndarray) -> bool:
    """Return whether the values of a line rise past their middle often enough for a texture."""
    above = line > (line.min() + line.max()) / 2
    return bool((above[1:] & ~above[:-1]).sum() >= LEAST_REPEATS)


def _line_means(share: np.ndarray, region: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean share of each row or column that has enough of the region, and its number of pixels."""
    counts = region.sum(axis=axis)
    lines = counts >= max(3, len(counts) // 32)
    return (share * region).sum(axis=axis)[lines] / counts[lines], counts[lines]


def grow(region: np.ndarray, by: int) -> np.ndarray:
    """Return the region with all pixels at a distance of at most `by` along rows and columns."""
    for _ in range(by):
        padded = np.pad(region, 1)
        region = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return region


def shrink(region: np.ndarray, by: int) -> np.ndarray:
    return ~grow(~region, by)


def connected_regions(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into regions of pixels that touch along rows or columns."""
    runs: list[tuple[int, int, int]] = []  # row, start, stop
    parents: list[int] = []

    def root(run: int) -> int:
        while parents[run] != run:
            run = parents[run]
        return run

    above: range = range(0)
    for row, line in enumerate(mask):
        changes = np.flatnonzero(np.diff(np.concatenate(([False], line, [False])).astype(np.int8)))
        first = len(runs)
        for start, stop in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
            parents.append(len(runs))
            for other in above:
                if runs[other][1] < stop and start < runs[other][2]:
                    parents[root(other)] = root(len(runs))
            runs.append((row, start, stop))
        above = range(first, len(runs))
    regions: dict[int, np.ndarray] = {}
    for run, (row, start, stop) in enumerate(runs):
        regions.setdefault(root(run), np.zeros_like(mask))[row, start:stop] = True
    return list(regions.values())
