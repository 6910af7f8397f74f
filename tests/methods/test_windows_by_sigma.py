"""Windows that follow the noise: compared with the rule at each sigma, saved, compiled and refused."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch

import clear_attn as clear
from clear_attn import Schedule
from clear_attn.methods import Clear, Dense, Layer
from clear_attn.patching.target import entry_hook_of
from tests.helpers import families, hardware
from tests.helpers.reference_model import in_raster_order, run
from tests.helpers.snapshots import assert_same, snapshot, train

GRID = (11, 20)
PAIRS = ((0.8, 7), (0.5, 5))
# The window at each sigma, written by hand: a bound belongs to the calls below it. None is dense.
DENSE_FIRST = Schedule(0.9, ("transformer_blocks.0",), {"transformer_blocks.1": 4}, PAIRS)
WINDOWS = {1.0: None, 0.91: None, 0.9: 7, 0.81: 7, 0.8: 5, 0.51: 5, 0.5: 3, 0.1: 3, 0.0: 3}


def reference_of(transformer, window, factor):
    """Return a model that computes the rule densely, with a window for the layers that `DENSE_FIRST` does not name."""
    reference = in_raster_order(transformer, [GRID], Clear(window, factor))
    for name in reference.attn_processors:
        processor = reference.get_submodule(name)
        grids, config, weight = processor.rule
        if name.startswith("transformer_blocks.0."):
            config = Clear(sum(GRID))
        elif name.startswith("transformer_blocks.1."):
            config = Clear(4, factor)
        processor.rule = grids, config, weight
    return reference


def expected_at(transformer, call, window, factor=1):
    """Return the output of the rule; a dense call has no pooled keys."""
    return run(transformer if window is None else reference_of(transformer, window, factor), call)


@pytest.mark.parametrize("backend", hardware.BACKENDS)
@pytest.mark.parametrize("factor", [1, 3])
def test_each_step_equals_the_rule_of_its_window(family, transformer, factor, backend):
    original = copy.deepcopy(transformer)
    clear.linearize(transformer, 3, factor, weights=None, schedule=DENSE_FIRST, backend=backend)
    for sigma, window in {0.95: None, 0.85: 7, 0.6: 5, 0.2: 3}.items():
        call = family.at_sigma(family.call(transformer, GRID, batch=2), sigma)
        output = run(transformer, call)
        expected = expected_at(original, call, window, factor)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        narrow = expected_at(original, call, 3, factor)
        assert torch.allclose(output, narrow, atol=1e-4) == (window == 3)


@pytest.mark.parametrize("sigma", WINDOWS)
def test_a_bound_belongs_to_the_calls_below(sigma):
    method = DENSE_FIRST.method_for(Clear(3, 2), Layer("single_transformer_blocks.0.attn"), sigma)
    assert method == (Dense() if WINDOWS[sigma] is None else Clear(WINDOWS[sigma], 2))
    for name, others in (("transformer_blocks.0.attn", Dense()), ("transformer_blocks.1.attn", Clear(4, 2))):
        expected = Dense() if WINDOWS[sigma] is None else others
        assert DENSE_FIRST.method_for(Clear(3, 2), Layer(name), sigma) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bounds_hold_in_the_precision_of_the_timestep(dtype):
    """A timestep that is rounded from a bound belongs to the calls below it, whichever way it was rounded."""
    for bound in torch.linspace(0.05, 0.95, 91, dtype=torch.float64).tolist():
        schedule = Schedule(windows_by_sigma=((bound, 9),))
        of_bound = torch.tensor(bound, dtype=dtype)
        above = torch.nextafter(of_bound, torch.ones((), dtype=dtype))
        windows = [schedule.window_above(schedule.sigma_of(sigma)) for sigma in (of_bound, above)]
        assert windows == [None, 9], bound


def test_a_batch_with_sigmas_on_both_sides_is_refused(family, transformer):
    clear.linearize(transformer, 3, weights=None, schedule=DENSE_FIRST)
    call = family.call(transformer, GRID, batch=2)
    for sigmas, name in (
        ((0.95, 0.85), "dense_above_sigma=0.9"),
        ((0.95, 0.1), "dense_above_sigma=0.9"),
        ((0.85, 0.7), "a sigma of windows_by_sigma=0.8"),
        ((0.1, 0.7), "a sigma of windows_by_sigma=0.5"),
    ):
        call["timestep"] = torch.tensor(sigmas) * family.timestep_of_sigma_1
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is between their sigmas, \[{sigmas[0]}"):
            run(transformer, call)
    call["timestep"] = torch.tensor([0.85, 0.82]) * family.timestep_of_sigma_1
    run(transformer, call)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_with_steps_in_flight(family, transformer, use_reentrant):
    """Each call is recomputed after the later ones have run, and uses its own plans."""
    sigmas = (0.95, 0.85, 0.6, 0.2)
    calls = [family.at_sigma(family.call(transformer, GRID, seed=seed), sigma) for seed, sigma in enumerate(sigmas)]
    for call in calls:
        call["hidden_states"].requires_grad_()
    reference = [copy.deepcopy(transformer), *(reference_of(transformer, window, 2) for window in (7, 5, 3))]

    def gradients(models):
        for call in calls:
            call["hidden_states"].grad = None
        sum(model(**call).sample.square().mean() for model, call in zip(models, calls, strict=True)).backward()
        return [call["hidden_states"].grad for call in calls]

    expected = gradients(reference)
    clear.linearize(transformer, 3, 2, weights=None, schedule=DENSE_FIRST)
    transformer.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant)
    )
    transformer.train()
    for ours, expected_one in zip(gradients([transformer] * 4), expected, strict=True):
        torch.testing.assert_close(ours, expected_one, atol=1e-6, rtol=1e-5)


@hardware.needs_compiler
@pytest.mark.slow
def test_compiled_blocks_are_not_recompiled_for_a_window_they_have_had():
    torch.compiler.reset()  # compilations are counted per line of code, over all tests
    transformer = families.FLUX.transformer(num_layers=3, num_single_layers=3)
    sigmas = (0.95, 0.85, 0.6, 0.2)
    calls = [families.FLUX.at_sigma(families.FLUX.call(transformer, GRID), sigma) for sigma in sigmas]
    clear.linearize(transformer, 3, 2, weights=None, schedule=DENSE_FIRST)
    expected = [run(transformer, call) for call in calls]
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before, compiled = graphs["unique_graphs"], []
    for _ in range(2):
        for call, output in zip(calls, expected, strict=True):
            torch.testing.assert_close(run(transformer, call), output, atol=1e-5, rtol=0)
        compiled.append(graphs["unique_graphs"] - before)
    assert compiled[0] == compiled[1]
    # One graph for each kind of block, group and method: of the double blocks, the first is always dense, the second is
    # dense or has its own window, the third is dense or has three windows, as the single blocks.
    assert compiled[0] <= 1 + 2 + 4 + 4


def test_plans_of_a_layout_are_as_many_as_its_methods():
    transformer = clear.linearize(families.FLUX.transformer(), 3, 2, weights=None, schedule=DENSE_FIRST)
    hook = entry_hook_of(transformer)
    for sigma in np.linspace(1, 0, 23):
        call = families.FLUX.at_sigma(families.FLUX.call(transformer, GRID), float(sigma))
        run(transformer, call)
    layout = hook.cache.layout(((GRID),), 7, True, torch.device("cpu"))
    plans = hook.cache._plans[layout]
    assert set(plans) == {Dense(), Clear(7, 2), Clear(5, 2), Clear(4, 2), Clear(3, 2)}


def test_is_saved_with_the_weights(family, transformer, tmp_path):
    calls = [family.at_sigma(family.call(transformer, GRID), sigma) for sigma in (0.95, 0.85, 0.6, 0.2)]
    clear.linearize(transformer, 3, weights=None, schedule=DENSE_FIRST)
    train(transformer)
    expected = [run(transformer, call) for call in calls]
    clear.save_pretrained(transformer, tmp_path / "clear")
    fresh = family.transformer()
    clear.linearize(fresh, weights=tmp_path / "clear")
    assert clear.info(fresh).schedule == DENSE_FIRST
    assert all(torch.equal(run(fresh, call), output) for call, output in zip(calls, expected, strict=True))
    # Saved and loaded by diffusers.
    transformer.save_pretrained(tmp_path / "whole")
    whole = type(transformer).from_pretrained(tmp_path / "whole").eval()
    clear.linearize(whole)
    assert clear.info(whole).schedule == DENSE_FIRST


def test_is_read_from_json_and_from_records_without_it():
    record = json.loads(json.dumps(DENSE_FIRST.to_dict()))
    assert Schedule.from_dict(record) == DENSE_FIRST
    assert record["windows_by_sigma"] == [[0.8, 7], [0.5, 5]]
    del record["windows_by_sigma"]
    assert Schedule.from_dict(record).windows_by_sigma == ()
    with pytest.raises(ValueError, match="windows_by_sigma must be pairs of a sigma and a window"):
        Schedule.from_dict({"windows_by_sigma": [0.5, 3]})


def test_is_shown(pipe):
    schedule = Schedule(0.9, windows={"transformer_blocks.0": 2}, windows_by_sigma=PAIRS)
    clear.linearize(pipe, 4, weights=None, schedule=schedule)
    found = clear.info(pipe)
    assert "windows_by_sigma=((0.8, 7), (0.5, 5))" in str(found)
    assert found.layers["transformer_blocks.1.attn"] == Clear(4)
    shown = repr(pipe.transformer.single_transformer_blocks[0].attn.processor)
    assert "Clear(window=4, down_factor=1), dense above sigma 0.9, window 7 above sigma 0.8, window 5 above" in shown
    named = repr(pipe.transformer.transformer_blocks[0].attn.processor)
    assert "Clear(window=2, down_factor=1), dense above sigma 0.9)" in named


def test_in_a_cascade(pipe):
    """A plan has the schedule; each stage draws with its windows."""
    pipe.set_progress_bar_config(disable=True)
    stages = clear.Stage(steps=4, strength=0.5, proportional=False)
    settings = {"height": 128, "width": 128, "base": clear.Base(64, 64, steps=1), "stages": stages, "seed": 5}
    call = {**settings, "window": 2, "weights": None}
    caption = "a red circle on a blue ground, at the top left"
    first = clear.highres(pipe, caption, **call, schedule=Schedule(windows_by_sigma=((0.6, 6),)))
    plan = clear.HighresPlan.from_json(first.plan.to_json())
    assert plan == first.plan
    assert plan.schedule == Schedule(windows_by_sigma=((0.6, 6),))
    assert clear.highres(pipe, **plan.arguments()).image.tobytes() == first.image.tobytes()
    narrow = clear.highres(pipe, caption, **call)
    wide = clear.highres(pipe, caption, **{**call, "window": 6})
    assert len({image.image.tobytes() for image in (first, narrow, wide)}) == 3
    none_above = clear.highres(pipe, caption, **call, schedule=Schedule(windows_by_sigma=((1.0, 6),)))
    assert none_above.image.tobytes() == narrow.image.tobytes()
    all_above = clear.highres(pipe, caption, **call, schedule=Schedule(windows_by_sigma=((0.0, 6),)))
    assert all_above.image.tobytes() == wide.image.tobytes()


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            (0.5, TypeError, r"must be pairs of a sigma and a window, .* got 0\.5"),
            ("ab", TypeError, "must be pairs of a sigma and a window, .* got 'ab'"),
            ({0.5: 3}, TypeError, r"must be pairs of a sigma and a window, .* got \{0\.5: 3\}"),
            ((0.5, 3), TypeError, r"must be pairs of a sigma and a window, .* got 0\.5 in it"),
            (((0.5,),), TypeError, r"got \(0\.5,\) in it"),
            (((0.5, 3, 2),), TypeError, r"got \(0\.5, 3, 2\) in it"),
            ((("0.5", 3),), TypeError, "a sigma of windows_by_sigma must be a number, got '0.5'"),
            (((True, 3),), TypeError, "must be a number, got True"),
            (((1.5, 3),), ValueError, "a sigma of windows_by_sigma must be from 0 to 1, got 1.5"),
            (((math.nan, 3),), ValueError, "got nan"),
            (((0.5, 0),), ValueError, "the window above sigma 0.5 must be at least 1, got 0"),
            (((0.5, 2.5),), TypeError, "the window above sigma 0.5 must be a whole number, got 2.5"),
            (((0.5, None),), TypeError, "got None.* are above dense_above_sigma"),
            (((0.5, 3), (0.8, 5)), ValueError, "sigmas must fall, .* got 0.8 after 0.5; sort them"),
            (((0.5, 3), (0.5, 5)), ValueError, "got 0.5 after 0.5"),
        ],
    )
    def test_values(self, given, error, words):
        with pytest.raises(error, match=words):
            Schedule(windows_by_sigma=given)

    @pytest.mark.parametrize("above", [0.8, 0.3])
    def test_dense_steps_that_are_not_above_the_first_sigma(self, above):
        with pytest.raises(ValueError, match=f"dense_above_sigma first .* got 0.8 after {above}"):
            Schedule(dense_above_sigma=above, windows_by_sigma=((0.8, 3),))

    def test_all_layers_are_named(self, transformer):
        before = snapshot(transformer)
        lists = tuple({name.split(".")[0] for name in transformer.attn_processors})
        schedule = Schedule(dense_layers=lists, windows_by_sigma=PAIRS)
        with pytest.raises(ValueError, match="which leaves none for windows_by_sigma"):
            clear.linearize(transformer, 3, weights=None, schedule=schedule)
        with pytest.raises(ValueError, match="which leaves none for windows_by_sigma"):
            clear.cost(transformer, 64, 64, schedule=schedule)
        assert_same(transformer, before)

    def test_another_method(self, transformer):
        before = snapshot(transformer)
        schedule = Schedule(windows_by_sigma=PAIRS)
        for call in (
            lambda: clear.linearize(transformer, method=clear.methods.LiT(), weights=None, schedule=schedule),
            lambda: clear.cost(transformer, 64, 64, method=clear.methods.Swin(), schedule=schedule, sigmas=[0.9]),
        ):
            with pytest.raises(ValueError, match="steps with a window of their own need CLEAR, and this is"):
                call()
        assert_same(transformer, before)
