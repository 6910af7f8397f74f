"""Plans: where text and image are, and the cells of pooled keys."""

import numpy as np
import pytest
import torch

from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import GridPlan, Plan, WindowPlan, pooled_cells
from clear_attn.core.window_mask import window_mask
from clear_attn.parallel.shard import Shard
from tests.helpers import reference_attention


@pytest.mark.parametrize(("text_first", "text", "image"), [(True, (0, 5), (5, 17)), (False, (12, 17), (0, 12))])
def test_a_plan_knows_where_text_and_image_are(text_first, text, image):
    plan = Plan(TokenLayout([(3, 4)], 5, text_first=text_first))
    assert (plan.text, plan.image) == (slice(*text), slice(*image))
    assert (plan.text_tokens, plan.image_tokens, plan.tokens) == (5, 12, 17)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text_queries", [True, False])
def test_positions_have_the_same_names_in_layout_and_plan(text_first, text_queries):
    layout = TokenLayout([(3, 4)], 5, text_first=text_first, text_queries=text_queries)
    for each in (layout, Shard(layout, 0, 1), Plan(layout)):
        text, image = ((0, 5), (5, 17)) if text_first else ((12, 17), (0, 12))
        assert (each.text_keys, each.image_keys) == (slice(*text), slice(*image))
        if not text_queries:
            text, image = ((0, 0) if text_first else (12, 12)), (0, 12)
        assert (each.text, each.image) == (slice(*text), slice(*image))


def test_a_grid_plan_takes_one_image():
    layout = TokenLayout([(3, 4)], 5)
    plan = GridPlan(layout)
    assert plan.grid == (3, 4)
    assert torch.equal(plan.permutation[plan.inverse_permutation], torch.arange(12))
    with pytest.raises(ValueError, match="too many values"):
        GridPlan(TokenLayout([(3, 4), (2, 2)], 5))


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("factor", [1, 3])
def test_keys_of_a_window_plan_are_text_image_and_cells(text_first, factor):
    layout = TokenLayout([(5, 7)], 4, text_first=text_first)
    plan = WindowPlan(layout, 3, factor)
    assert plan.pooled_tokens == (6 if factor == 3 else 0)
    assert plan.key_tokens == plan.tokens + plan.pooled_tokens
    mask = window_mask(plan.query, plan.key, plan.radius_sq)
    raster = layout.permutation
    expected = reference_attention.window_mask([(5, 7)], 3)[raster][:, raster]
    assert torch.equal(mask[:, layout.image], expected)
    assert mask[:, layout.text].all()
    assert mask[:, plan.tokens :].all()


def test_cells_and_their_weights():
    """Cells of 2 x 2 on a grid of 3 x 4 tokens: the lower ones are cut by the border."""
    cells, weights = pooled_cells([(3, 4)], 2)
    assert cells.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 0, 0], [10, 11, 0, 0]]
    assert weights.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 0, 0], [2, 2, 0, 0]]


def test_cells_of_several_grids():
    cells, weights = pooled_cells([(3, 4), (1, 2)], 2)
    assert cells[-1].tolist() == [12, 13, 12, 12]
    assert weights[-1].tolist() == [2, 2, 0, 0]
    assert np.isclose(weights.mean(axis=1), 1).all()


def test_no_cells_of_one_token():
    cells, weights = pooled_cells([(3, 4), (1, 2)], 1)
    assert (len(cells), len(weights)) == (0, 0)


def test_cells_point_at_tokens_in_tile_order():
    layout = TokenLayout([(12, 20)], 0)
    plan, (cells, _) = WindowPlan(layout, 3, 4), pooled_cells([(12, 20)], 4)
    assert torch.equal(layout.permutation[plan.pool_index], torch.from_numpy(cells))
