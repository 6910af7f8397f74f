import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_attn.backends.attention import pool
from clear_attn.core.layout import Images, TokenLayout
from clear_attn.methods import Clear
from tests.helpers import reference_attention

GRIDS = st.lists(st.tuples(st.integers(1, 37), st.integers(1, 37)), min_size=1, max_size=3)


@given(grids=GRIDS)
def test_tile_order_is_a_permutation_within_segments(grids):
    layout = TokenLayout(grids, 3)
    tokens = torch.arange(layout.image_tokens)
    assert torch.equal(tokens[layout.permutation][layout.inverse_permutation], tokens)
    assert layout.permutation.sort().values.tolist() == tokens.tolist()
    start = 0
    for height, width in grids:
        part = layout.permutation[start : start + height * width]
        assert part.min() == start
        assert part.max() == start + height * width - 1
        start += height * width


@given(grids=GRIDS)
def test_images_alone_have_the_order_and_the_coordinates_that_they_have_among_all(grids):
    layout, first = TokenLayout(grids, 3), grids[0][0] * grids[0][1]
    image, references = layout.of_images(Images(0, 1)), layout.of_images(Images(1))
    assert layout.of_images(Images(1)) is references
    assert torch.equal(image.permutation, layout.permutation[:first])
    assert (image is layout) == (references is None) == (len(grids) == 1)
    if references:
        assert torch.equal(references.permutation, layout.permutation[first:] - first)
        expected = reference_attention.coordinates(grids)[first:].float()
        query = torch.stack(Clear(4).plan(references).query, dim=1)
        assert torch.equal(query[references.inverse_permutation], expected)
        assert references.on(torch.device("meta")).unit == grids[0]


def test_tile_order_is_nested_tiles():
    layout = TokenLayout([(32, 48)], 0)
    y, x = Clear().plan(layout).query
    for cell in range(0, layout.image_tokens, 64):
        assert (y[cell : cell + 64].max() - y[cell : cell + 64].min()) == 7
        assert (x[cell : cell + 64].max() - x[cell : cell + 64].min()) == 7
    for tile in range(0, layout.image_tokens, 128):
        assert (y[tile : tile + 128].max() - y[tile : tile + 128].min()) == 7
        assert (x[tile : tile + 128].max() - x[tile : tile + 128].min()) == 15


@given(grids=GRIDS)
def test_coordinates_are_those_of_the_tokens(grids):
    layout = TokenLayout(grids, 5, text_first=False)
    plan = Clear(4).plan(layout)
    expected = reference_attention.coordinates(grids).float()
    assert torch.equal(torch.stack(plan.query, dim=1)[layout.inverse_permutation], expected)
    assert torch.equal(plan.key.y[layout.image], plan.query.y)
    assert plan.radius_sq[layout.text].isinf().all()
    assert (plan.radius_sq[layout.image] == 16).all()


@given(grids=GRIDS, factor=st.integers(2, 6))
def test_pooling_is_a_weighted_mean_of_cells(grids, factor):
    layout = TokenLayout(grids, 0)
    plan = Clear(4, factor).plan(layout)
    weight = torch.rand(1, 1, 1, factor, 1, factor, 1)
    raster = torch.randn(2, 3, layout.image_tokens, 4)
    expected = reference_attention.pool(raster, grids, factor, weight.view(factor, factor))
    torch.testing.assert_close(pool(raster[:, :, layout.permutation], plan, weight), expected)
    ones = torch.ones(1, 1, layout.image_tokens, 1)
    mean = pool(ones, plan, torch.full((factor, factor), 1 / factor**2))
    torch.testing.assert_close(mean, torch.ones_like(mean))


@pytest.mark.parametrize(
    ("grids", "text", "error", "words"),
    [
        ([], 0, ValueError, "at least one grid"),
        ([(0, 4)], 0, ValueError, "height of a grid must be at least 1, got 0"),
        ([(4, 2.5)], 0, TypeError, "width of a grid must be a whole number, got 2.5"),
        ([(4, 4)], -1, ValueError, "got -1"),
    ],
)
def test_refuses(grids, text, error, words):
    with pytest.raises(error, match=words):
        TokenLayout(grids, text)


def test_made_under_inference_mode_works_in_training():
    with torch.inference_mode():
        layout = TokenLayout([(9, 9)], 2)
        plan = Clear(3, 2).plan(layout)
        tensors = [layout.permutation, plan.pool_weight, plan.radius_sq, *plan.block_indices, *plan.tiles]
    assert not any(tensor.is_inference() for tensor in tensors)
