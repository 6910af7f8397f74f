"""Regions: image queries of some rows, with the keys around them."""

import torch

from clear_attn.core.coordinates import segments_of, select_rows
from clear_attn.core.region import AttentionRegion, expand_to_sequence
from clear_attn.core.window_mask import window_mask
from tests.helpers import reference_attention

CPU = torch.device("cpu")


def region_of(window=3, before=2, after=1):
    """Return a region with rows 8 to 12 of 20 x 6 tokens as queries, and rows 6 to 14 as keys."""
    segments = segments_of([(20, 6)])
    queries, keys = (select_rows(segments, [slice(*rows)]) for rows in ((8, 12), (6, 14)))
    region = AttentionRegion(queries, keys, before, after, 24 + before, slice(before, 24 + before), window, CPU)
    return region, queries, keys


def test_the_window_limits_image_keys_only():
    region, queries, keys = region_of()
    assert (region.image_tokens, region.key_tokens) == (24, 2 + 48 + 1)
    mask = window_mask(region.query, region.key, region.radius_sq)
    expected = reference_attention.window_mask([(20, 6)], 3)
    assert torch.equal(mask[:, 2:-1], expected[torch.from_numpy(queries.raster)][:, torch.from_numpy(keys.raster)])
    assert mask[:, :2].all()
    assert mask[:, -1].all()


def test_tiles_and_block_indices_are_made_once():
    region, _, keys = region_of()
    assert region.tiles is region.tiles
    assert region.block_indices is region.block_indices
    assert int(region.tiles.image_keys) == len(keys.y)
    pairs = sum(len(group.queries) * int(group.mask.sum()) for group in region.tiles.groups())
    assert pairs == int(window_mask(region.query, region.key, region.radius_sq)[:, 2:-1].sum())


def test_image_rows_in_the_sequence():
    image = torch.randn(2, 3, 5, 4)
    sequence = expand_to_sequence(image, 9, slice(1, 6))
    assert sequence.shape == (2, 3, 9, 4)
    assert torch.equal(sequence[:, :, 1:6], image)
    assert sequence.transpose(1, 2).is_contiguous()
    region, *_ = region_of(before=2)
    assert torch.equal(region.expand_to_sequence(torch.ones(1, 1, 24))[:, :, 2:], torch.ones(1, 1, 24))
