"""Each pipeline with each operation: the numbers of the dense rule, or an error whose remedy leads to them."""

import functools
import itertools
import re

import pytest
import torch
from safetensors.torch import save_file

import clear_attn as clear
from clear_attn.weights.parameters import POOLED, copy_values
from tests.helpers.reference_model import keep_dense, put_in_raster_order
from tests.helpers.snapshots import checkpoint_for, layers_of, snapshot
from tests.matrix.columns import BEFORE, COLUMNS
from tests.matrix.operations import Cell, nothing
from tests.matrix.page import PAGE, notes, sections, tables
from tests.matrix.rows import PRESENT, ROWS

WINDOW, FACTOR = 3, 2
EVERY_COLUMN = "FLUX text-to-image", "SD3 text-to-image"
EVERY_ROW = ("nothing else",)
ONE_ORDER = "`compile_repeated_blocks`", "`torch.compile`"  # only one order by default, because they take long


def cells():
    for (row, _), (name, column) in itertools.product(PRESENT.items(), COLUMNS.items()):
        for order in column.orders:
            usual = name in EVERY_ROW or (row in EVERY_COLUMN and not (name in ONE_ORDER and order == BEFORE))
            marks = [] if usual else [pytest.mark.matrix]
            yield pytest.param(row, name, order, id=f"{row}-{name}-{order}", marks=[*marks, *column.marks])


def pooled_weight():
    return torch.rand(FACTOR, FACTOR, generator=torch.Generator().manual_seed(9)) / FACTOR**2


def distilled(transformer):
    """Return random weights, with the same pooled weight in all layers."""
    values = checkpoint_for(transformer)
    shape = (1, 1, 1, FACTOR, 1, FACTOR, 1)
    return values, {layer + POOLED: pooled_weight().view(shape) for layer in layers_of(transformer)}


def assert_untouched(transformer, before):
    """Do as `assert_same`, without values on the meta device and packed values, which torch cannot compare."""
    after = snapshot(transformer)
    for values in (after["state"], before["state"]):
        for name in [name for name, value in values.items() if type(value) is not torch.Tensor or value.is_meta]:
            values[name] = None
    assert after["state"].keys() == before["state"].keys()
    assert all(value is None or torch.equal(value, before["state"][name]) for name, value in after["state"].items())
    assert {**after, "state": None} == {**before, "state": None}


def draw_reference(cell, column, operation, call):
    """Draw with the dense rule, after an operation on the pipeline."""
    pipe = cell.row.pipeline()
    transformer = pipe.transformer
    if column.trained:
        copy_values(distilled(transformer)[0], layers_of(transformer))
    pipe = operation(pipe, cell) or pipe
    if getattr(pipe, "controlnet", None) is not None:  # Z-Image's has layers of its transformer, and is dense
        keep_dense(pipe.controlnet)
    weight = pooled_weight() if column.trained else None
    put_in_raster_order(pipe.transformer, cell.row.grids, clear.methods.Clear(WINDOW, FACTOR), weight)
    return cell.row.draw(pipe, **call)


@pytest.mark.parametrize(("row", "column", "order"), list(cells()))
def test_cell(row, column, order, tmp_path, record_property):
    missing = COLUMNS[column].missing(row)
    row, column = ROWS[row], COLUMNS[column]

    def linearize(pipe):
        weights = None
        if column.trained:
            weights = tmp_path / "weights.safetensors"
            values, pooled = distilled(row.pipeline().transformer)
            save_file({**values, **pooled}, weights)
        return clear.linearize(pipe, WINDOW, FACTOR, weights=weights)

    (tmp_path / "reference").mkdir()
    cell, reference_cell = Cell(row, tmp_path, linearize), Cell(row, tmp_path / "reference", linearize)
    if missing:
        pipe = row.pipeline()
        with pytest.raises((AssertionError, AttributeError, RuntimeError, TypeError, ValueError), match=missing):  # noqa: PT012
            column.do(pipe, cell)
            row.draw(pipe, **column.call)
        return
    expected = draw_reference(reference_cell, column, column.same or column.do, column.call)
    scale = expected.abs().max().item()
    if column.changes:
        call = {**column.call, "attention_kwargs": None}
        without = draw_reference(reference_cell, column, nothing, call)
        assert (without - expected).abs().max() > 2 * column.tolerance * scale
    pipe, refusal = row.pipeline(), column.refusals.get((row.family, order))
    operations = [column.do, lambda pipe, cell: cell.linearize(pipe)]
    first, second = operations if order == BEFORE else reversed(operations)
    pipe = first(pipe, cell) or pipe
    if refusal:
        before = snapshot(pipe.transformer)
        with pytest.raises(RuntimeError, match=refusal.words) as error:  # noqa: PT012
            second(pipe, cell)
            row.draw(pipe, **column.call)
        if order == BEFORE:
            assert_untouched(pipe.transformer, before)
        record_property(refusal.words, str(error.value))
        second = refusal.remedy
    pipe = second(pipe, cell) or pipe
    drawn = row.draw(pipe, **column.call)
    torch.testing.assert_close(drawn, expected, atol=column.tolerance * scale, rtol=0)


@functools.cache
def dense(row):
    return ROWS[row].draw(ROWS[row].pipeline())


@pytest.mark.parametrize("row", PRESENT)
def test_restored_each_pipeline_draws_as_before(row):
    pipe = ROWS[row].pipeline()
    clear.linearize(pipe, WINDOW, FACTOR, weights=None)
    local = ROWS[row].draw(pipe)
    assert (local - dense(row)).abs().max() > 1e-3
    clear.restore(pipe)
    assert torch.equal(ROWS[row].draw(pipe), dense(row))


def test_the_page_has_these_cells():
    text = PAGE.read_text(encoding="utf-8")
    assert sections(tables()) in text, "write it again: python -m tests.matrix"
    for words, number in notes().items():
        assert re.search(rf"^{number}\. .*{words}", text, re.MULTILINE), words
