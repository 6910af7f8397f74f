"""The model of docs/adding-a-model.md: the code of the guide, in the tests of every model."""

import re
from pathlib import Path

import pytest
import torch

import clear_attn as clear
from clear_attn import models
from tests.helpers.reference_model import in_raster_order, run
from tests.helpers.snapshots import assert_same, snapshot

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
GRIDS = [(1, 1), (7, 5), (13, 17)]


@pytest.fixture(scope="module")
def guide():
    code = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    names = {"__name__": "my_models"}
    registered = list(models.ADAPTERS)
    for block in code[:2]:
        exec(block, names)
    yield names, code[2]
    models.ADAPTERS[:] = registered


@pytest.fixture
def transformer(guide):
    torch.manual_seed(1)
    return guide[0]["TinyTransformer2DModel"]().eval()


def make_call(grid, text=7, batch=2):
    height, width = grid
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "grid": grid,
        "positions": torch.cartesian_prod(torch.arange(height).float(), torch.arange(width).float()),
        "encoder_hidden_states": torch.randn(batch, text, 12),
        "timestep": torch.full((batch,), 0.7),
    }


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize(("window", "down_factor"), [(3, 1), (4, 2), (2, 5)])
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_rule_in_raster_order(transformer, grid, window, down_factor, backend):
    call = make_call(grid)
    expected = run(in_raster_order(transformer, [grid], clear.methods.Clear(window, down_factor)), call)
    dense = run(transformer, call)
    clear.linearize(transformer, window, down_factor, weights=None, backend=backend)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)
    if grid == GRIDS[-1]:
        assert (expected - dense).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["Swin", "LiT", "Agent"])
def test_other_methods(transformer, name):
    call = make_call((6, 8))
    clear.linearize(transformer, method=getattr(clear.methods, name)(), weights=None)
    assert run(transformer, call).isfinite().all()


def test_a_schedule_reads_sigma(transformer):
    call = make_call((13, 17))
    dense = run(transformer, call)
    clear.linearize(transformer, 3, weights=None, schedule=clear.Schedule(dense_above_sigma=0.5))
    torch.testing.assert_close(run(transformer, call), dense, atol=1e-5, rtol=0)
    local = run(transformer, {**call, "timestep": torch.full((2,), 0.2)})
    assert (local - dense).abs().max() > 1e-4


def test_the_code_that_uses_it(guide):
    exec(guide[1], guide[0])
    assert not clear.is_linearized(guide[0]["transformer"])


def test_restores_bit_for_bit(transformer):
    before, call = snapshot(transformer), make_call((7, 5))
    expected = run(transformer, call)
    clear.restore(clear.linearize(transformer, 3, 2, weights=None))
    assert_same(transformer, before)
    assert torch.equal(run(transformer, call), expected)


def test_weights_are_saved_and_loaded(guide, transformer, tmp_path):
    call = make_call((13, 17))
    clear.linearize(transformer, 3, 2, weights=None)
    with torch.no_grad():
        for layer in transformer.layers:
            layer.to_q.weight.mul_(1.1)
            layer.processor.spatial_weight.mul_(1.2)
    expected = run(transformer, call)
    clear.save_pretrained(transformer, tmp_path)
    other = guide[0]["TinyTransformer2DModel"].from_config(transformer.config).eval()
    state = {name: value for name, value in transformer.state_dict().items() if "processor" not in name}
    other.load_state_dict(state)
    clear.linearize(other, weights=tmp_path)
    torch.testing.assert_close(run(other, call), expected, atol=1e-6, rtol=0)


def test_a_whole_model_is_saved_and_loaded(guide, transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    call = make_call((7, 5))
    assert torch.equal(
        run(guide[0]["TinyTransformer2DModel"].from_pretrained(tmp_path).eval(), call), run(transformer, call)
    )


def test_cost_counts_its_layers(transformer):
    dense, local = (clear.cost(transformer, 512, 512, window=window) for window in (64, 4))
    assert (local.height, local.width, local.text_tokens) == (32, 32, 77)
    assert local.step_flops < dense.step_flops


def test_arguments_that_do_not_fit(transformer):
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(ValueError, match="a grid of 7 x 6 needs 42 image tokens, got 35"):
        run(transformer, {**make_call((7, 5)), "grid": (7, 6)})


def test_a_class_of_another_package_is_not_taken(guide):
    namesake = type("TinyTransformer2DModel", (), {"__module__": "elsewhere"})()
    assert models.adapter_for(namesake) is None
