"""A plot of the rule: what one token attends to, and which blocks of the mask are computed."""

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

# Of what is out of sight, of what is seen in part, and of what is seen whole.
COLOURS = ("#eef0f4", "#8fb0e0", "#24508f")
TOKEN = "#e2572b"


def plot_window(
    height: int, width: int, window: int, down_factor: int = 1, token: tuple[int, int] | None = None
) -> Figure:
    """Draws what one image token sees, and the blocks of attention's mask in raster order and in tile order.

    A kernel computes blocks of 128 queries and 128 keys, and leaves out those in which no query sees a key. In tile
    order, the one that this library computes in, neighbours stand together, and in all but small pictures fewer blocks
    are left to compute. Text is not drawn: every token sees it.

    Args:
        height, width (`int`): of the grid in tokens; one token is 16 x 16 pixels in FLUX.1 and SD3.
        window (`int`): radius in tokens.
        down_factor (`int`, defaults to 1): side in tokens of pooled cells, which every token sees; 1 for none.
        token (row and column, *optional*): whose view is drawn; by default the one in the middle.

    Returns:
        A matplotlib figure, which a notebook shows, and `figure.savefig(file)` saves.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: a number that is not whole or out of range; a token off the grid.

    Example:
        >>> figure = plot_window(64, 64, window=16, token=(32, 32))
        >>> figure.axes[0].get_title()
        'token 32, 32 sees 793 of 4,096 image tokens'
    """
    layout = TokenLayout([(height, width)], 0)
    plan = Clear(window, down_factor).plan(layout)
    height, width = layout.grids[0]
    row, column = token = (height // 2, width // 2) if token is None else token
    for name, place, length in (("row", row, height), ("column", column, width)):
        check_whole_number(f"the {name} of token", place, "rows and columns count from 0", least=0)
        if place >= length:
            raise ValueError(f"token={token} is off a grid of {height} x {width}; rows and columns count from 0")
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("plot_window needs matplotlib: pip install 'clear-attn[plot]'") from None
    # By pyplot, for only then do notebooks show figures; closed, or they would show it twice.
    figure = pyplot.figure(figsize=(13, 4.6), layout="constrained")
    pyplot.close(figure)
    view, raster, tile = figure.subplots(1, 3)
    _draw_view(view, layout, plan, (row, column))
    in_raster_order = Coordinates(*(axis[layout.inverse_permutation] for axis in plan.query))
    _draw_blocks(raster, "raster order", block_indices(in_raster_order, *_keys(plan, in_raster_order)))
    _draw_blocks(tile, "tile order", plan.block_indices)
    return figure


def _keys(plan: WindowPlan, image: Coordinates) -> tuple[Coordinates, Tensor]:
    """Positions and reach of all keys, the image's at the places given."""
    rest = slice(plan.image_tokens, None)
    places = (torch.cat([axis, key[rest]]) for axis, key in zip(image, plan.key, strict=True))
    return Coordinates(*places), plan.radius_sq


def _draw_view(axes: Any, layout: TokenLayout, plan: WindowPlan, token: tuple[int, int]) -> None:
    height, width = layout.grids[0]
    y, x = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float().T
    place = Coordinates(*(torch.tensor(float(each)) for each in token))
    attended = in_window(place, Coordinates(y, x), plan.radius_sq[: layout.image_tokens]).view(height, width)
    _show(axes, attended.long() * 2)
    axes.add_artist(_square(token, 1, facecolor=TOKEN))
    title = f"token {token[0]}, {token[1]} sees {int(attended.sum()):,} of {layout.image_tokens:,} image tokens"
    if plan.pooled_tokens:
        factor = plan.down_factor
        for cell in torch.cartesian_prod(torch.arange(0, height, factor), torch.arange(0, width, factor)).tolist():
            axes.add_artist(_square(tuple(cell), factor, fill=False, edgecolor=COLOURS[1], linewidth=0.6))
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
    """For each block `[query blocks, key blocks]`: 0 none of it is seen, 1 a part, 2 all."""
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

    axes.imshow(values.numpy(), cmap=ListedColormap(COLOURS), vmin=0, vmax=2, interpolation="nearest")
