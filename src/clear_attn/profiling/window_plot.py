"""Plot which keys one token attends to, and which blocks of the attention mask are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import WindowPlan
from clear_attn.core.window_mask import BLOCK, BlockIndices, Coordinates, block_indices, in_window
from clear_attn.methods import Clear
from clear_attn.utils.validation import check_whole_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of keys and blocks that are not attended to, attended to in part, and in full.
COLORS = ("#eef0f4", "#8fb0e0", "#24508f")
TOKEN = "#e2572b"


def plot_window(
    height: int, width: int, window: int, down_factor: int = 1, token: tuple[int, int] | None = None
) -> Figure:
    """Plot which keys one image token attends to, and the blocks of the mask in raster order and in tile order.

    A kernel computes blocks of 128 queries and 128 keys, and skips blocks in which no query attends to a key. The
    library computes in tile order, in which neighbors are close together, so that except in small images fewer blocks
    remain. Text is not drawn: every token attends to it.

    Args:
        height, width (`int`): the grid in tokens; one token is 16 x 16 pixels, 8 x 8 in the small FLUX.
        window (`int`): radius in tokens.
        down_factor (`int`, defaults to 1): side in tokens of pooled cells, to which every token attends; 1 for none.
        token (row and column, *optional*): the query; defaults to the middle.

    Returns:
        A matplotlib figure; a notebook shows it, and `figure.savefig(file)` saves it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: a number is not whole or out of range; the token is outside the grid.

    Examples:
        >>> figure = plot_window(64, 64, window=16, token=(32, 32))
        >>> figure.axes[0].get_title()
        'token 32, 32 attends to 793 of 4,096 image tokens'
    """
    layout = TokenLayout([(height, width)], 0)
    plan = Clear(window, down_factor).plan(layout)
    height, width = layout.grids[0]
    row, column = token = (height // 2, width // 2) if token is None else token
    for name, index, length in (("row", row, height), ("column", column, width)):
        check_whole_number(f"the {name} of token", index, "rows and columns count from 0", least=0)
        if index >= length:
            raise ValueError(f"token={token} is outside a grid of {height} x {width}; rows and columns count from 0")
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("plot_window needs matplotlib: pip install matplotlib") from None
    # Notebooks show figures of pyplot only, and show them twice unless they are closed.
    figure = pyplot.figure(figsize=(13, 4.6), layout="constrained")
    pyplot.close(figure)
    window_axes, raster, tile = figure.subplots(1, 3)
    _draw_window(window_axes, layout, plan, (row, column))
    in_raster_order = Coordinates(*(axis[layout.inverse_permutation] for axis in plan.query))
    _draw_blocks(raster, "raster order", block_indices(in_raster_order, *_keys(plan, in_raster_order)))
    _draw_blocks(tile, "tile order", plan.block_indices)
    return figure


def _keys(plan: WindowPlan, image: Coordinates) -> tuple[Coordinates, Tensor]:
    """Return the coordinates and squared radius of all keys, with the image keys at the given coordinates."""
    rest = slice(plan.image_tokens, None)
    axes = (torch.cat([axis, key[rest]]) for axis, key in zip(image, plan.key, strict=True))
    return Coordinates(*axes), plan.radius_sq


def _draw_window(axes: Any, layout: TokenLayout, plan: WindowPlan, token: tuple[int, int]) -> None:
    height, width = layout.grids[0]
    y, x = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float().T
    query = Coordinates(*(torch.tensor(float(each)) for each in token))
    attended = in_window(query, Coordinates(y, x), plan.radius_sq[: layout.image_tokens]).view(height, width)
    _show(axes, attended.long() * 2)
    axes.add_artist(_square(token, 1, facecolor=TOKEN))
    title = f"token {token[0]}, {token[1]} attends to {int(attended.sum()):,} of {layout.image_tokens:,} image tokens"
    if plan.pooled_tokens:
        factor = plan.down_factor
        for cell in torch.cartesian_prod(torch.arange(0, height, factor), torch.arange(0, width, factor)).tolist():
            axes.add_artist(_square(tuple(cell), factor, fill=False, edgecolor=COLORS[1], linewidth=0.6))
        title += f"\nand the means of {plan.pooled_tokens:,} cells"
    axes.set(title=title, xlabel="column", ylabel="row", xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _square(token: tuple[int, ...], side: int, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((token[1] - 0.5, token[0] - 0.5), side, side, **style)


def _draw_blocks(axes: Any, order: str, lists: BlockIndices) -> None:
    kinds = _kinds(lists)
    _show(axes, kinds)
    computed = (kinds > 0).float().mean().item()
    axes.set(title=f"{order}: {computed:.0%} of the blocks to compute", xlabel=f"keys, blocks of {BLOCK}")
    axes.set_ylabel(f"queries, blocks of {BLOCK}")


def _kinds(lists: BlockIndices) -> Tensor:
    """Return `[query blocks, key blocks]`: 0 for a block that is not attended to, 1 in part, 2 in full."""
    kinds = torch.zeros(lists.partial_index.shape[2:], dtype=torch.int64)
    for kind, counts, indices in (
        (1, lists.partial_count, lists.partial_index),
        (2, lists.full_count, lists.full_index),
    ):
        for row, count, index in zip(kinds, counts[0, 0].tolist(), indices[0, 0].long(), strict=True):
            row[index[:count]] = kind
    return kinds


def _show(axes: Any, values: Tensor) -> None:
    from matplotlib.colors import ListedColormap

    axes.imshow(values.numpy(), cmap=ListedColormap(COLORS), vmin=0, vmax=2, interpolation="nearest")
