"""Each model, called through its hooks: all inputs with image tokens, all sizes, all kinds of calls."""

import copy
import gc
import inspect
import re
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import clear_attn as clear
from clear_attn.backends import attention, flex, tiled
from clear_attn.backends import reference as dense
from clear_attn.core.layout import grid_permutation
from clear_attn.models import adapter_for
from clear_attn.models.parsing import position_ids
from clear_attn.patching import plan_cache
from clear_attn.patching.target import entry_hook_of
from tests.helpers import hardware
from tests.helpers.families import FLUX, SD3, each_family, each_family_with_each
from tests.helpers.reference_model import check_compiled_blocks, in_raster_order, joined, run

GRID = st.sampled_from([(1, 1), (3, 5), (8, 8), (13, 7), (17, 23), (16, 24)])

SIZES = {"text": 40, "window": 30, "factor": 5}


def keywords_of(transformer):
    return adapter_for(transformer).keywords


@each_family()
@given(data=st.data())
@settings(max_examples=25)
def test_equals_the_rule_in_raster_order(family, data):
    drawn = data.draw(st.lists(GRID, min_size=1, max_size=family.most_grids), "grids")
    grids = [family.grid(*grid) for grid in drawn]
    text, window, factor = (data.draw(st.integers(1, most), name) for name, most in SIZES.items())
    batch, controlnet = data.draw(st.integers(1, 3), "batch"), data.draw(st.booleans(), "controlnet")
    transformer = family.transformer(**data.draw(st.sampled_from(family.variants)))
    call = family.call(transformer, *grids, text=text, batch=batch, controlnet=controlnet)
    expected = run(in_raster_order(transformer, grids, clear.methods.Clear(window, factor)), call)
    backend = data.draw(st.sampled_from(hardware.BACKENDS), "backend")
    clear.linearize(transformer, window, factor, weights=None, backend=backend)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


@each_family(fused=True)
def test_fused_projections(family, transformer):
    call = family.call(transformer, (13, 7))
    clear.linearize(transformer, 4, weights=None)
    expected = run(transformer, call)
    transformer.fuse_qkv_projections()
    clear.linearize(transformer, 4, weights=None)
    assert getattr(transformer, family.blocks)[0].attn.fused_projections
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


@each_family()
def test_a_window_that_covers_the_grid_equals_the_original_model(family, transformer):
    call = family.call(transformer, (13, 17), batch=2)
    expected = run(transformer, call)
    clear.linearize(transformer, 25, weights=None)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


@each_family()
def test_positional_arguments_and_dataclass_output(family, transformer):
    call = family.call(transformer, (6, 5))
    clear.linearize(transformer, 3, weights=None)
    expected = run(transformer, call)
    if call.get("guidance") is None:
        call.pop("guidance", None)
    with torch.no_grad():
        assert torch.equal(joined(transformer(*call.values())), expected)


@each_family()
def test_the_callers_keywords_are_unchanged(family, transformer):
    call = family.call(transformer, (6, 5), controlnet=True)
    call[keywords_of(transformer)] = {}
    before = copy.deepcopy(call)
    clear.linearize(transformer, 3, weights=None)
    with torch.no_grad():
        transformer(**call)
    torch.testing.assert_close(call, before, atol=0, rtol=0)


@each_family()
def test_portrait_and_landscape_in_turn(family, transformer):
    grids = [family.grid(*grid) for grid in ((5, 12), (12, 5), (5, 12))]
    calls = [family.call(transformer, grid, text=text) for grid, text in zip(grids, (7, 7, 9), strict=True)]
    expected = []
    for call, grid in zip(calls, grids, strict=True):
        expected.append(run(in_raster_order(transformer, [grid], clear.methods.Clear(4, 2)), call))
    clear.linearize(transformer, 4, 2, weights=None)
    for _ in range(2):
        for call, output in zip(calls, expected, strict=True):
            torch.testing.assert_close(run(transformer, call), output, atol=1e-5, rtol=0)


@each_family_with_each("backend", hardware.BACKENDS)
def test_threads_use_their_own_layouts(family, transformer, backend):
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    calls = [family.call(transformer, family.grid(*grid)) for grid in ((5, 12), (12, 5), (9, 9), (4, 16))]
    expected = [run(transformer, call) for call in calls]
    forget_plans(transformer)
    wrong = []

    def work(start):
        for turn in range(12):
            which = (start + turn) % len(calls)
            if not torch.allclose(run(transformer, calls[which]), expected[which], atol=1e-5):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@each_family()
def test_a_deep_copy_is_independent(family, transformer):
    call = family.call(transformer, (9, 9))
    original = run(transformer, call)
    clear.linearize(transformer, 3, 2, weights=None)
    expected = run(transformer, call)
    twin = copy.deepcopy(transformer)
    with torch.no_grad():
        next(iter(adapter_for(twin).attention_layers(twin).values())).processor.spatial_weight.mul_(2)
    assert not torch.allclose(run(twin, call), expected, atol=1e-5)
    assert torch.equal(run(transformer, call), expected)
    clear.restore(twin)
    assert clear.is_linearized(transformer)
    torch.testing.assert_close(run(twin, call), original)
    assert torch.equal(run(transformer, call), expected)


@each_family_with_each("factor", [1, 2])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_with_two_sizes_in_flight(family, transformer, use_reentrant, factor):
    if use_reentrant and not family.reentrant:
        pytest.skip("the dense model fails too: this diffusers passes its blocks tuples, which are not detached")
    sizes = family.grid(11, 20), family.grid(6, 11)
    calls = [family.call(transformer, grid, seed=seed) for seed, grid in enumerate(sizes)]
    inputs = [image.requires_grad_() for call in calls for image in family.images(call)]
    reference = [in_raster_order(transformer, [grid], clear.methods.Clear(3, factor)) for grid in sizes]
    names = [name for name, _ in transformer.named_parameters()]

    def gradients(models):
        """Return gradients of both inputs and all parameters; zero for unused ones of Qwen-Image's last block."""
        loss = sum(joined(model(**call)).square().mean() for model, call in zip(models, calls, strict=True))
        for tensor in (*inputs, *(x for model in models for x in model.parameters())):
            tensor.grad = None
        loss.backward()
        found = [dict(model.named_parameters()) for model in dict.fromkeys(models)]
        of_each = ([each[name] for each in found] for name in names)
        return [x.grad for x in inputs] + [
            sum(torch.zeros_like(x) if x.grad is None else x.grad for x in parts) for parts in of_each
        ]

    expected = gradients(reference)
    clear.linearize(transformer, 3, factor, weights=None)
    transformer.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant)
    )
    transformer.train()
    for ours, expected_one in zip(gradients([transformer, transformer]), expected, strict=True):
        torch.testing.assert_close(ours, expected_one, atol=1e-6, rtol=1e-5)


@each_family(quick=("flux", "chroma"))  # one for each way of a context to the layers
def test_compiled_blocks(family, transformer):
    """With references and padding, if the model has them."""
    grids = [(13, 7), (4, 6)][: family.most_grids]
    options = {"padded": (3,)} if family.padding else {}
    check_compiled_blocks(transformer, family.call(transformer, *grids, **options))


@hardware.needs_compiler
@pytest.mark.slow
def test_compiled_transformer(family, transformer):
    call = family.call(transformer, (13, 7))
    clear.linearize(transformer, 4, 2, weights=None)
    expected = run(transformer, call)
    torch.testing.assert_close(run(torch.compile(transformer), call), expected, atol=1e-5, rtol=0)


@hardware.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", [FLUX, SD3], ids=["flux", "sd3"])
def test_caches_and_compilations_are_bounded(family, transformer, monkeypatch):
    """Caches are bounded, FlexAttention is compiled a few times, and no path is dense."""
    for module in (attention, dense, tiled):
        monkeypatch.setattr(module, "softmax_attention", None)
    clear.linearize(transformer, 4, weights=None, backend="flex")
    compiled = []
    monkeypatch.setattr(
        flex,
        "attend_blocks",
        lambda *args, call=flex.attend_blocks, **kwargs: compiled.append(1) or call(*args, **kwargs),
    )
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    alive = []
    for size in range(20):
        run(transformer, family.call(transformer, (12 + size, 13 + 2 * size), text=5 + 3 * size))
        gc.collect()
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert len(compiled) == 20 * family.layers
    assert max(alive[10:]) <= alive[9], alive
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 4
    assert len(entry_hook_of(transformer).cache._layouts) <= plan_cache.LAYOUTS
    assert len(entry_hook_of(transformer).cache._plans) <= 2 * plan_cache.LAYOUTS
    assert len(position_ids.read_ids.recent) <= 16
    gc.collect()
    dead = [reference for reference, *_ in position_ids.read_ids.recent if reference() is not None]
    assert not dead


@each_family(residuals=True)
def test_gradients_of_controlnet_residuals_alone(family, transformer):
    call = family.call(transformer, (6, 5), controlnet=True)
    residual = next(value for name, value in call.items() if "controlnet" in name)
    residual = tree_leaves(residual)[0].requires_grad_()
    transformer.requires_grad_(False)
    clear.linearize(transformer, 3, weights=None)
    joined(transformer(**call)).sum().backward()
    assert residual.grad.abs().sum() > 0


@each_family(default_device=True)
def test_another_default_device(family, transformer):
    call = family.call(transformer, (11, 20))
    clear.linearize(transformer, 3, 2, weights=None)
    expected = run(transformer, call)
    forget_plans(transformer)
    grid_permutation.cache_clear()
    position_ids.read_ids.recent.clear()
    with torch.device("meta"):
        assert torch.equal(run(transformer, call), expected)


def forget_plans(transformer):
    entry_hook_of(transformer).cache = plan_cache.PlanCache()


class TestHooks:
    def test_names_a_layer_whose_processor_was_replaced(self, family, transformer):
        original = transformer.transformer_blocks[1].attn.processor
        clear.linearize(transformer, 3, weights=None)
        transformer.transformer_blocks[1].attn.set_processor(original)
        with pytest.raises(
            RuntimeError, match=rf"transformer_blocks\.1\.attn was replaced by a {type(original).__name__}"
        ):
            run(transformer, family.call(transformer, (4, 4)))

    def test_names_a_layer_that_was_rebuilt_without_its_parameter(self, family, transformer):
        clear.linearize(transformer, 3, 2, weights=None)
        attn = transformer.transformer_blocks[1].attn
        attn.set_processor(type(attn.processor)())
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn was replaced"):
            run(transformer, family.call(transformer, (4, 4)))

    def test_refuses_controlnet_residuals_of_another_image(self, family, transformer):
        call = family.call(transformer, (4, 6), controlnet=True)
        name = [name for name in call if "controlnet" in name][-1]
        call[name] = [residual[:, :20] for residual in call[name]]
        clear.linearize(transformer, 3, weights=None)
        with pytest.raises(ValueError, match=rf"{name} must have .* 24 image tokens, got 20"):
            run(transformer, call)

    @each_family()
    def test_a_layer_without_a_context(self, family, transformer):
        clear.linearize(transformer, 3, weights=None)
        name, layer = next(iter(adapter_for(transformer).attention_layers(transformer).items()))
        text = [torch.randn(1, 2, 32)] if "encoder_hidden_states" in inspect.signature(layer.forward).parameters else []
        words = rf"{re.escape(name)} was called without a context|called outside a call of its linearized transformer"
        with pytest.raises(RuntimeError, match=words):
            layer(torch.randn(1, 4, 32), *text)

    def test_an_attention_mask_is_refused(self, family, transformer):
        clear.linearize(transformer, 3, weights=None)
        call = family.call(transformer, (4, 4))
        call[keywords_of(transformer)] = {"attention_mask": torch.ones(1, 1, 1, 23)}
        with pytest.raises(RuntimeError, match=r"takes no attention mask, got one of shape \[1, 1, 1, 23\]"):
            run(transformer, call)

    def test_context_parallelism_is_refused(self, family, transformer):
        clear.linearize(transformer, 3, weights=None)
        transformer.transformer_blocks[1].attn.processor._parallel_config = object()
        with pytest.raises(
            RuntimeError, match=r"transformer_blocks\.1\.attn does not work under .*context parallelism"
        ):
            run(transformer, family.call(transformer, (4, 4)))
