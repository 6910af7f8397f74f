"""Time against pixels, both on logarithmic axes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from clear_attn.tools.bench.rows import TOKEN, Row

STYLES = {
    "dense": {"color": "black"},
    "dense-pooled": {"color": "gray"},
    "raster-flex": {"linestyle": "--"},
    "bound": {"color": "black", "linestyle": ":"},
}


def plot(rows: Sequence[Row], path: Path) -> None:
    """One panel for each level, one line for each variant, window and down_factor.

    Raises:
        ValueError: matplotlib writes no such kind of file.
    """
    panels = sorted({(row.level, row.backward) for row in rows}, reverse=True)
    figure = Figure(figsize=(7 * len(panels), 5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        of_panel = [row for row in rows if (row.level, row.backward) == panel]
        for label, points in _lines(of_panel):
            style = STYLES.get(points[0].variant, {})
            pixels = [row.height * row.width * TOKEN**2 for row in points]
            axes.plot(pixels, [row.median_s for row in points], marker="o", label=label, **style)
            low, high = [row.min_s for row in points], [row.max_s for row in points]
            axes.fill_between(pixels, low, high, alpha=0.2, color=axes.lines[-1].get_color())
        first = of_panel[0]
        what = "one denoising step" if first.level == "model" else "one attention"
        passes = ", forward and backward" if first.backward else ""
        axes.set(xscale="log", yscale="log", xlabel="pixels", ylabel="seconds")
        axes.set_title(f"{what}{passes}: {first.heads} heads of {first.head_dim}, {first.dtype}\n{first.device}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each line, by size. Dense attention and the bound know no window: one row stands for all."""

    def label(row: Row) -> str:
        if row.variant in ("dense", "bound"):
            return row.variant
        pooled = f", f = {row.down_factor}" if row.down_factor > 1 else ""
        return f"{row.variant}, r = {row.window}{pooled}"

    lines = []
    for name, group in itertools.groupby(sorted(rows, key=label), key=label):
        points = list({(row.height, row.width): row for row in group}.values())
        lines.append((name, sorted(points, key=lambda row: row.height * row.width)))
    return lines
