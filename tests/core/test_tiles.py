"""Tiles of queries with the keys that they attend to, against the rule for all pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_attn.core.coordinates import segments_of, select_rows
from clear_attn.core.tiles import TileGroup, Tiles, build_tiles, tile_side
from tests.helpers import reference_attention

CPU = torch.device("cpu")


def tokens_of(grids):
    return select_rows(segments_of(grids), [slice(0, height) for height, _ in grids])


def attended(tiles, count):
    """Return bool `[queries, keys]` of the pairs in tiles; each query must be in one tile only."""
    pairs = torch.zeros(count, count, dtype=torch.bool)
    queries = torch.cat([group.queries.flatten() for group in tiles.groups()])
    assert queries.sort().values.tolist() == list(range(count))
    for group in tiles.groups():
        for query, key in zip(group.queries, group.keys, strict=True):
            pairs[query[:, None], key] = group.mask
    return pairs


@given(
    grids=st.lists(st.tuples(st.integers(1, 21), st.integers(1, 21)), min_size=1, max_size=2),
    window=st.integers(1, 30),
)
def test_tiles_hold_the_pairs_of_the_rule(grids, window):
    tokens = tokens_of(grids)
    tiles = build_tiles(tokens, tokens, window, CPU)
    expected = reference_attention.window_mask(grids, window)
    raster = torch.from_numpy(tokens.raster)
    assert torch.equal(attended(tiles, len(raster)), expected[raster][:, raster])
    assert int(tiles.image_keys) == len(raster)


def test_keys_that_no_query_attends_to_are_left_out():
    tokens = tokens_of([(64, 64)])
    for group in build_tiles(tokens, tokens, 4, CPU).groups():
        assert group.mask.any(dim=0).all()
        assert group.keys.shape[1] <= (8 + 2 * 3) ** 2


def test_inner_tiles_are_one_group():
    tokens = tokens_of([(80, 80)])
    groups = build_tiles(tokens, tokens, 8, CPU).groups()
    assert max(len(group.queries) for group in groups) == 8 * 8
    assert len(groups) == 9


def test_joined_groups_can_be_split_again():
    groups = [
        TileGroup(torch.arange(6).view(3, 2), torch.arange(12).view(3, 4), torch.eye(2, 4, dtype=torch.bool)),
        TileGroup(torch.tensor([[7]]), torch.tensor([[5, 6]]), torch.tensor([[True, False]])),
    ]
    joined = Tiles.join(groups, image_keys=13)
    assert joined.sizes.tolist() == [[3, 2, 4], [1, 1, 2]]
    for group, expected in zip(joined.groups(), groups, strict=True):
        assert all(torch.equal(*pair) for pair in zip(group, expected, strict=True))


@pytest.mark.parametrize(("window", "device", "side"), [(16, "cpu", 8), (17, "cpu", 16), (8, "cuda", 16)])
def test_the_side_of_a_tile(window, device, side):
    assert tile_side(window, torch.device(device)) == side
