"""Dense steps, dense layers and windows per layer: compared with the rule, saved, copied and restored."""

import copy
import json
import math

import pytest
import torch
from diffusers import FirstBlockCacheConfig

import clear_attn as clear
from clear_attn import Schedule
from tests.helpers import families, hardware
from tests.helpers.reference_model import in_raster_order, run
from tests.helpers.snapshots import assert_same, snapshot, train

GRID = (11, 20)
# In both families: a dense first block, and a wider window in the other blocks.
LAYERS = Schedule(dense_layers=("transformer_blocks.0",), windows={"transformer_blocks": 6})


def reference_of(transformer, grid, window, factor, schedule):
    """Return a model that computes the rule densely in raster order, with the window of each layer."""
    reference = in_raster_order(transformer, [grid], clear.methods.Clear(window, factor))
    for name in reference.attn_processors:
        layer = name.removesuffix(".processor")
        grids, config, weight = reference.get_submodule(layer).processor.rule
        named = schedule.names(layer)
        if named in schedule.dense_layers:
            config = clear.methods.Clear(sum(grid))
        elif named:
            config = clear.methods.Clear(schedule.windows[named], config.down_factor)
        reference.get_submodule(layer).processor.rule = grids, config, weight
    return reference


@pytest.mark.parametrize("backend", hardware.BACKENDS)
@pytest.mark.parametrize("factor", [1, 3])
def test_each_layer_equals_the_rule_of_its_window(family, transformer, factor, backend):
    call = family.call(transformer, GRID, batch=2)
    expected = run(reference_of(transformer, GRID, 3, factor, LAYERS), call)
    uniform = run(in_raster_order(transformer, [GRID], clear.methods.Clear(3, factor)), call)
    assert not torch.allclose(expected, uniform, atol=1e-3)
    clear.linearize(transformer, 3, factor, weights=None, schedule=LAYERS, backend=backend)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [1, 2])
def test_calls_above_the_sigma_equal_the_original_model(family, transformer, factor):
    call = family.call(transformer, GRID, batch=2)
    original = copy.deepcopy(transformer)
    clear.linearize(transformer, 3, factor, weights=None)
    local = {sigma: run(transformer, family.at_sigma(call, sigma)) for sigma in (0.2, 0.8)}
    clear.linearize(
        transformer,
        3,
        factor,
        weights=None,
        schedule=Schedule(dense_above_sigma=0.8, windows={"transformer_blocks": 3}),
    )
    for sigma in (1.0, 0.81):
        one = family.at_sigma(call, sigma)
        torch.testing.assert_close(run(transformer, one), run(original, one), atol=1e-5, rtol=0)
    for sigma, expected in local.items():
        assert torch.equal(run(transformer, family.at_sigma(call, sigma)), expected)


def test_a_batch_with_sigmas_on_both_sides_is_refused(family, transformer):
    call = family.call(transformer, GRID, batch=2)
    call["timestep"] = torch.tensor([0.9, 0.1]) * family.timestep_of_sigma_1
    clear.linearize(transformer, 3, weights=None, schedule=Schedule(dense_above_sigma=0.5))
    with pytest.raises(ValueError, match=r"dense_above_sigma=0.5 is between .* \[0\.9, 0\.1\]"):
        run(transformer, call)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_with_two_steps_in_flight(family, transformer, use_reentrant):
    """The dense call is recomputed after the local one has run, and each uses its own layouts."""
    schedule = Schedule(dense_above_sigma=0.5, dense_layers=LAYERS.dense_layers, windows=LAYERS.windows)
    calls = [family.at_sigma(family.call(transformer, GRID, seed=seed), sigma) for seed, sigma in ((0, 0.9), (1, 0.2))]
    for call in calls:
        call["hidden_states"].requires_grad_()
    reference = [copy.deepcopy(transformer), reference_of(transformer, GRID, 3, 2, schedule)]

    def gradients(models):
        for tensor in (call["hidden_states"] for call in calls):
            tensor.grad = None
        sum(model(**call).sample.square().mean() for model, call in zip(models, calls, strict=True)).backward()
        return [call["hidden_states"].grad for call in calls]

    expected = gradients(reference)
    clear.linearize(transformer, 3, 2, weights=None, schedule=schedule)
    transformer.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant)
    )
    transformer.train()
    for ours, expected_one in zip(gradients([transformer, transformer]), expected, strict=True):
        torch.testing.assert_close(ours, expected_one, atol=1e-6, rtol=1e-5)


def test_a_cache_carries_tokens_from_dense_steps_to_local_ones():
    """A cached residual is added steps later, so all steps must keep their tokens in one order."""
    transformer = families.FLUX.transformer()
    schedule = Schedule(dense_above_sigma=0.65, windows={"single_transformer_blocks": 6})
    call = families.FLUX.call(transformer, GRID)
    steps = [{**families.FLUX.at_sigma(call, sigma)} for sigma in (0.651, 0.65001, 0.649, 0.648, 0.1)]
    original, local = copy.deepcopy(transformer), reference_of(transformer, GRID, 8, 1, schedule)
    clear.linearize(transformer, 8, weights=None, schedule=schedule)

    def cached(*models):
        """Run each step with the model for its sigma; all share the cache of the first model."""
        model = models[0]
        model.enable_cache(FirstBlockCacheConfig(threshold=0.4))
        computed, outputs = [], []
        model.single_transformer_blocks[-1].attn.register_forward_hook(lambda *_: computed.append(len(outputs)))
        with model.cache_context("cond"):
            for number, step in enumerate(steps):
                if len(models) > 1 and number == 2:
                    for name in model.attn_processors:
                        layer = name.removesuffix(".processor")
                        model.get_submodule(layer).processor = models[1].get_submodule(layer).processor
                outputs.append(run(model, step))
        return computed, outputs

    expected_computed, expected = cached(original, local)
    computed, outputs = cached(transformer)
    assert computed == expected_computed
    assert computed == [0, 4]  # so the first local steps add a residual of a dense step
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=0)


@hardware.needs_compiler
@pytest.mark.slow
def test_compiled_blocks_are_not_recompiled():
    torch.compiler.reset()  # compilations are counted per line of code, over all tests
    transformer = families.FLUX.transformer(num_layers=5, num_single_layers=5)
    calls = [families.FLUX.at_sigma(families.FLUX.call(transformer, GRID), sigma) for sigma in (0.9, 0.2, 0.8, 0.1)]
    schedule = Schedule(
        0.5, ("transformer_blocks.1",), {"single_transformer_blocks.1": 5, "single_transformer_blocks.3": 5}
    )
    clear.linearize(transformer, 3, weights=None, schedule=schedule)
    expected = [run(transformer, call) for call in calls]
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    for call, output in zip(calls[:2], expected[:2], strict=True):
        torch.testing.assert_close(run(transformer, call), output, atol=1e-5, rtol=0)
    before = graphs["unique_graphs"]
    for call, output in zip(calls[2:], expected[2:], strict=True):
        torch.testing.assert_close(run(transformer, call), output, atol=1e-5, rtol=0)
    assert graphs["unique_graphs"] == before


def test_is_restored_and_copied(family, transformer):
    call = family.call(transformer, GRID)
    before = snapshot(transformer)
    with clear.linearized(transformer, 3, weights=None, schedule=LAYERS):
        outer = run(transformer, call)
        with clear.linearized(transformer, 3, weights=None):
            assert not torch.allclose(run(transformer, call), outer, atol=1e-4)
        assert torch.equal(run(transformer, call), outer)
        assert torch.equal(run(copy.deepcopy(transformer), call), outer)
    assert_same(transformer, before)


def test_is_saved_with_the_weights(family, transformer, tmp_path):
    schedule = Schedule(0.6, LAYERS.dense_layers, LAYERS.windows)
    call = family.at_sigma(family.call(transformer, GRID), 0.3)
    clear.linearize(transformer, 3, weights=None, schedule=schedule)
    train(transformer)
    expected = run(transformer, call)
    clear.save_pretrained(transformer, tmp_path / "clear")
    fresh = family.transformer()
    clear.linearize(fresh, weights=tmp_path / "clear")
    assert torch.equal(run(fresh, call), expected)
    record = json.loads((tmp_path / "clear" / "clear_config.json").read_text())
    assert Schedule(**record["schedule"]) == schedule
    clear.linearize(fresh, weights=tmp_path / "clear", schedule=Schedule())
    assert not torch.allclose(run(fresh, call), expected, atol=1e-4)
    # Saved and loaded by diffusers.
    transformer.save_pretrained(tmp_path / "whole")
    whole = type(transformer).from_pretrained(tmp_path / "whole").eval()
    clear.linearize(whole)
    torch.testing.assert_close(run(whole, call), expected)


def test_a_layer_rebuilt_without_its_window_is_named(family, transformer):
    clear.linearize(transformer, 3, weights=None, schedule=LAYERS)
    attn = transformer.transformer_blocks[1].attn
    attn.set_processor(type(attn.processor)())
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn was replaced"):
        run(transformer, family.call(transformer, (4, 4)))


def test_cost_counts_it(family, transformer):
    uniform = clear.cost(transformer, 176, 320, window=3)
    other = clear.cost(transformer, 176, 320, window=6)
    scheduled = clear.cost(transformer, 176, 320, window=3, schedule=Schedule(0.9, (), {"transformer_blocks.1": 6}))
    assert scheduled.step_flops == uniform.step_flops + (other.step_flops - uniform.step_flops) // uniform.layers
    assert "above sigma 0.9 are dense" in str(scheduled)
    everything = tuple({name.split(".")[0] for name in transformer.attn_processors})
    dense = clear.cost(transformer, 176, 320, window=3, schedule=Schedule(dense_layers=everything))
    assert dense.step_flops == dense.dense_step_flops
    clear.linearize(transformer, 3, weights=None, schedule=LAYERS)
    assert clear.cost(transformer, 176, 320) == clear.cost(transformer, 176, 320, window=3, schedule=LAYERS)
    json.dumps(scheduled.to_dict())


def test_in_a_cascade(pipe):
    pipe.set_progress_bar_config(disable=True)
    schedule = Schedule(0.5, ("single_transformer_blocks.0",), {"transformer_blocks": 3})
    stages = clear.Stage(steps=4, strength=0.5, proportional=False)
    settings = {"height": 128, "width": 128, "base": clear.Base(64, 64, steps=1), "stages": stages, "seed": 5}
    call = {**settings, "window": 2, "weights": None}
    first = clear.highres(pipe, "a red circle on a blue ground, at the top left", **call, schedule=schedule)
    plan = clear.HighresPlan.from_json(first.plan.to_json())
    assert plan == first.plan
    assert plan.schedule == schedule
    again = clear.highres(pipe, **plan.arguments())
    assert again.image.tobytes() == first.image.tobytes()
    without = clear.highres(pipe, **{**plan.arguments(), "schedule": None})
    assert without.image.tobytes() != first.image.tobytes()


def test_proportional_attention_of_a_dense_call_counts_no_pooled_keys(family, transformer):
    call = family.call(transformer, GRID)
    with clear.proportional_attention(transformer):
        expected = run(transformer, family.at_sigma(call, 0.9))
    clear.linearize(transformer, 3, 2, weights=None, schedule=Schedule(0.5))
    with clear.proportional_attention(transformer):
        torch.testing.assert_close(run(transformer, family.at_sigma(call, 0.9)), expected, atol=1e-5, rtol=0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"dense_above_sigma": 1.5}, ValueError, "dense_above_sigma must be from 0 to 1, got 1.5"),
            ({"dense_above_sigma": -0.1}, ValueError, "got -0.1"),
            ({"dense_above_sigma": math.nan}, ValueError, "got nan"),
            ({"dense_above_sigma": "0.5"}, TypeError, "dense_above_sigma must be a number, got '0.5'"),
            ({"dense_layers": "transformer_blocks"}, TypeError, r"give \('transformer_blocks',\)"),
            ({"dense_layers": (0,)}, TypeError, "layers are named as in the model, .* got 0"),
            ({"windows": {"a": 0}}, ValueError, "the window of a must be at least 1, got 0"),
            ({"windows": {"a": 2.5}}, TypeError, "the window of a must be a whole number, got 2.5"),
            ({"dense_layers": ("a",), "windows": {"a": 3}}, ValueError, "a is in dense_layers and in windows"),
        ],
    )
    def test_values(self, arguments, error, words):
        with pytest.raises(error, match=words):
            Schedule(**arguments)

    @pytest.mark.parametrize("name", ["transformer_blocks.99", "transformer_block", "norm_out", ""])
    def test_unknown_layers(self, transformer, name):
        before = snapshot(transformer)
        for schedule in (Schedule(dense_layers=(name,)), Schedule(windows={name: 3})):
            with pytest.raises(ValueError, match=f"names '{name}', and this .* it has transformer_blocks.0.attn to"):
                clear.linearize(transformer, 3, weights=None, schedule=schedule)
            with pytest.raises(ValueError, match=f"names '{name}'"):
                clear.cost(transformer, 64, 64, schedule=schedule)
        assert_same(transformer, before)

    def test_another_type(self, transformer):
        with pytest.raises(TypeError, match=r"schedule must be a clear_attn\.Schedule, got 5 of type int"):
            clear.linearize(transformer, 3, weights=None, schedule=5)


def test_the_longest_name_wins():
    schedule = Schedule(dense_layers=("blocks.1",), windows={"blocks": 8, "blocks.1.attn2": 4})
    names = ["blocks.0.attn", "blocks.1.attn", "blocks.1.attn2", "blocks.10.attn", "other.1"]
    method = clear.methods.Clear(16)
    methods = [schedule.method_for(method, clear.methods.Layer(name)) for name in names]
    assert methods == [*map(clear.methods.Clear, [8]), clear.methods.Dense(), *map(clear.methods.Clear, [4, 8, 16])]
