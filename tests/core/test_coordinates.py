"""Coordinates of tokens on one or several grids, and the tile order of tokens."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_attn.core.coordinates import (
    axis_coordinates,
    invert_permutation,
    raster_coordinates,
    segments_of,
    select_rows,
    tile_permutation,
    to_tensor,
)


def test_raster_order_is_row_by_row():
    y, x = raster_coordinates((2, 3))
    assert (y.tolist(), x.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])


def test_tile_order_visits_cells_of_8_by_8_inside_tiles_of_16_by_16():
    y, x = (axis[tile_permutation((32, 32))] for axis in raster_coordinates((32, 32)))
    cells = list(dict.fromkeys(zip((y // 8).tolist(), (x // 8).tolist(), strict=True)))
    assert cells[:8] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert y[:9].tolist() == [0] * 8 + [1]
    assert x[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]


@given(st.permutations(range(9)))
def test_an_inverse_undoes_its_permutation(permutation):
    permutation = np.array(permutation)
    assert permutation[invert_permutation(permutation)].tolist() == list(range(9))
    assert invert_permutation(permutation)[permutation].tolist() == list(range(9))


def test_a_second_grid_is_stretched_over_the_first():
    assert axis_coordinates(4, 4).tolist() == [0, 1, 2, 3]
    assert axis_coordinates(2, 4).tolist() == [0.5, 2.5]
    assert axis_coordinates(8, 4).tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25]
    first, second = segments_of([(4, 6), (2, 3)])
    assert (first.start, second.start) == (0, 24)
    assert second.x.tolist() == [0.5, 2.5, 4.5]


@given(length=st.integers(1, 70), first=st.integers(1, 70))
def test_coordinates_are_exact_sixteenths(length, first):
    coordinates = axis_coordinates(length, first)
    assert coordinates.dtype == np.float32
    assert (coordinates * 16 == np.round(coordinates * 16)).all()


def test_selected_rows_keep_their_coordinates_and_raster_indices():
    segments = segments_of([(12, 3), (6, 2)])
    selected = select_rows(segments, [slice(4, 12), slice(1, 3)])
    assert sorted(selected.raster.tolist()) == [*range(12, 36), *range(38, 42)]
    raster = selected.raster[selected.rank]
    assert raster.tolist() == sorted(raster.tolist())
    expected_y = np.concatenate([np.repeat(segment.y, len(segment.x)) for segment in segments])
    expected_x = np.concatenate([np.tile(segment.x, len(segment.y)) for segment in segments])
    assert (selected.y == expected_y[selected.raster]).all()
    assert (selected.x == expected_x[selected.raster]).all()


def test_a_tensor_of_a_strided_array():
    values = np.arange(6)[::2]
    assert torch.equal(to_tensor(values, torch.device("cpu")), torch.tensor([0, 2, 4]))
