import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_attn.core.layout import TokenLayout
from clear_attn.core.window_mask import BLOCK, Points, block_lists, dense_mask, visible
from clear_attn.utils.validation import ClearConfig


def test_visible_is_strict():
    origin, keys = (
        Points(torch.zeros(1), torch.zeros(1)),
        Points(torch.tensor([0.0, 3.0, 3.0]), torch.tensor([4.0, 4.0, 5.0])),
    )
    assert visible(origin, keys, torch.tensor(25.0)).tolist() == [True, False, False]
    assert visible(origin, keys, torch.tensor(26.0)).tolist() == [True, True, False]
    assert visible(origin, keys, torch.tensor(float("inf"))).all()


def test_interior_queries_see_the_published_number_of_keys():
    for window, expected in ((8, 193), (16, 793), (32, 3205)):
        layout = TokenLayout([(80, 80)], 0, ClearConfig(window))
        middle = Points(torch.tensor([40.0]), torch.tensor([40.0]))
        assert dense_mask(middle, layout.key, layout.reach).sum() == expected


@given(
    grids=st.lists(st.tuples(st.integers(1, 41), st.integers(1, 41)), min_size=1, max_size=2),
    text=st.integers(0, 300),
    window=st.integers(1, 50),
    factor=st.integers(1, 5),
    text_first=st.booleans(),
)
def test_block_lists_neither_miss_nor_invent(grids, text, window, factor, text_first):
    layout = TokenLayout(grids, text, ClearConfig(window, factor), text_first=text_first)
    mask = dense_mask(layout.query, layout.key, layout.reach)
    lists = block_lists(layout.query, layout.key, layout.reach)
    blocks = [chunk.split(BLOCK, dim=1) for chunk in mask.split(BLOCK)]
    for row, pieces in enumerate(blocks):
        partial = set(lists.partial_index[0, 0, row, : lists.partial_count[0, 0, row]].tolist())
        full = set(lists.full_index[0, 0, row, : lists.full_count[0, 0, row]].tolist())
        assert not partial & full
        for column, piece in enumerate(pieces):
            assert column in partial | full or not piece.any()
            assert column not in full or piece.all()


def test_block_lists_of_tile_order_are_short():
    layout = TokenLayout([(64, 64)], 128, ClearConfig(8))
    visited = layout.block_lists.partial_count + layout.block_lists.full_count
    # A disc of radius 8 dilated by an 8 x 16 tile reaches at most 3 x 3 tiles; one block more is the text.
    assert visited.max() <= 10
