"""Plots of the rule, compared with the masks."""

import sys

import pytest
import torch

import clear_attn as clear
from clear_attn.core.window_mask import window_mask
from clear_attn.profiling.window_plot import _kinds


@pytest.mark.parametrize("factor", [1, 4])
def test_blocks_are_those_of_the_mask(factor):
    plan = clear.methods.Clear(3, factor).plan(clear.TokenLayout([(24, 40)], 0))
    mask = window_mask(plan.query, plan.key, plan.radius_sq)
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 128, 0, -mask.shape[0] % 128))
    seen = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(dim=(1, 3))
    kinds = _kinds(plan.block_indices)
    assert kinds.shape == seen.shape
    assert (kinds > 0)[seen].all()


def test_what_is_drawn():
    figure = clear.plot_window(64, 64, 16, token=(3, 7))
    view, raster, tile = figure.axes
    seen = view.images[0].get_array() == 2
    for y, x, expected in (
        (3, 7, True),
        (3, 22, True),
        (3, 23, False),
        (14, 18, True),
        (15, 18, False),
        (63, 63, False),
    ):
        assert seen[y, x] == expected
    assert view.get_title() == f"token 3, 7 attends to {int(seen.sum())} of 4,096 image tokens"
    shares = [(axes.images[0].get_array() > 0).mean() for axes in (raster, tile)]
    assert shares[1] < shares[0]
    assert clear.plot_window(8, 12, 3, 4).axes[0].get_title().endswith("\nand the means of 6 cells")
    assert tile.get_title() == f"tile order: {shares[1]:.0%} of the blocks to compute"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((8, 8, 0), ValueError, "window must be at least 1"),
        ((8, 8, 3, 1, (8, 0)), ValueError, r"token=\(8, 0\) is outside a grid of 8 x 8"),
        ((8, 8, 3, 1, (0, -1)), ValueError, "the column of token must be at least 0, got -1"),
        ((8.5, 8, 3), TypeError, "the height of a grid must be a whole number"),
    ],
)
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        clear.plot_window(*arguments)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        clear.plot_window(8, 8, 3)
