import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_attn.core.layout import TokenLayout
from clear_attn.core.window_mask import BLOCK, Coordinates, block_indices, in_window, window_mask
from clear_attn.methods import Clear


def test_the_radius_is_exclusive():
    origin, keys = (
        Coordinates(torch.zeros(1), torch.zeros(1)),
        Coordinates(torch.tensor([0.0, 3.0, 3.0]), torch.tensor([4.0, 4.0, 5.0])),
    )
    assert in_window(origin, keys, torch.tensor(25.0)).tolist() == [True, False, False]
    assert in_window(origin, keys, torch.tensor(26.0)).tolist() == [True, True, False]
    assert in_window(origin, keys, torch.tensor(float("inf"))).all()


def test_interior_queries_attend_to_the_published_number_of_keys():
    for window, expected in ((8, 193), (16, 793), (32, 3205)):
        plan = Clear(window).plan(TokenLayout([(80, 80)], 0))
        middle = Coordinates(torch.tensor([40.0]), torch.tensor([40.0]))
        assert window_mask(middle, plan.key, plan.radius_sq).sum() == expected


@given(
    grids=st.lists(st.tuples(st.integers(1, 41), st.integers(1, 41)), min_size=1, max_size=2),
    text=st.integers(0, 300),
    window=st.integers(1, 50),
    factor=st.integers(1, 5),
    text_first=st.booleans(),
)
def test_block_lists_have_every_block_with_a_pair(grids, text, window, factor, text_first):
    plan = Clear(window, factor).plan(TokenLayout(grids, text, text_first=text_first))
    mask = window_mask(plan.query, plan.key, plan.radius_sq)
    lists = block_indices(plan.query, plan.key, plan.radius_sq)
    blocks = [chunk.split(BLOCK, dim=1) for chunk in mask.split(BLOCK)]
    for row, pieces in enumerate(blocks):
        partial = set(lists.partial_index[0, 0, row, : lists.partial_count[0, 0, row]].tolist())
        full = set(lists.full_index[0, 0, row, : lists.full_count[0, 0, row]].tolist())
        assert not partial & full
        for column, piece in enumerate(pieces):
            assert column in partial | full or not piece.any()
            assert column not in full or piece.all()


def test_block_lists_of_tile_order_are_short():
    plan = Clear(8).plan(TokenLayout([(64, 64)], 128))
    visited = plan.block_indices.partial_count + plan.block_indices.full_count
    # A disc of radius 8 dilated by an 8 x 16 tile reaches at most 3 x 3 tiles; one block more is the text.
    assert visited.max() <= 10
