"""Time by number of pixels, both on logarithmic axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from clear_attn.tools.bench import TOKEN
from clear_attn.tools.bench.case import Row
from clear_attn.utils.atomic import atomic_file

STYLES: dict[str, Any] = {
    "dense": {"color": "black"},
    "dense-pooled": {"color": "gray"},
    "raster-flex": {"linestyle": "--"},
    "bound": {"color": "black", "linestyle": ":"},
}


def plot(title: str, rows: Sequence[Row], file: Path) -> None:
    """Draw one line for each variant, window and down_factor.

    Raises:
        ValueError: matplotlib does not know the format.
    """
    lines: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        lines[_label(row)][row.case.height * row.case.width * TOKEN**2] = row
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for label, by_pixels in sorted(lines.items()):
        pixels = sorted(by_pixels)
        points = [by_pixels[each] for each in pixels]
        medians = [row.timing.median_s for row in points]
        (line,) = axes.plot(pixels, medians, marker="o", label=label, **STYLES.get(points[0].subject.name, {}))
        low, high = ([bound(row.timing.seconds) for row in points] for bound in (min, max))
        axes.fill_between(pixels, low, high, alpha=0.2, color=line.get_color())
    case = rows[0].case
    passes = ", forward and backward" if case.backward else ""
    axes.set(xscale="log", yscale="log", xlabel="pixels", ylabel="seconds")
    axes.set_title(f"{title}{passes}: {case.heads} heads of {case.head_dim}, {case.dtype_name}\n{rows[0].device_name}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    with atomic_file(file) as unfinished:
        figure.savefig(unfinished, dpi=120)


def _label(row: Row) -> str:
    """Return the line that a row is on. Dense attention and the bound have no window, so each has one line."""
    name, case = row.subject.name, row.case
    if name in ("dense", "bound"):
        return name
    return f"{name}, r = {case.window}" + (f", f = {case.down_factor}" if case.down_factor > 1 else "")
