"""Hooks of diffusers around a transformer's `forward` get raster order, whenever they are added."""

import copy

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import clear_attn as clear
from tests.helpers.families import FLUX, each_family
from tests.helpers.reference_model import joined, run
from tests.helpers.snapshots import assert_same, snapshot

GRID = (9, 20)


class Recorder(ModelHook):
    def __init__(self):
        super().__init__()
        self.inputs, self.outputs = [], []

    def pre_forward(self, module, *args, **kwargs):
        self.inputs.append(kwargs)
        return args, kwargs

    def post_forward(self, module, output):
        self.outputs.append(output)
        return output


class Replacer(Recorder):
    """A hook that replaces `forward` and calls the original, as caches do."""

    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


def add_hook(transformer, hook, name="recorder"):
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, name)


@each_family()
@pytest.mark.parametrize("make_hook", [Recorder, Replacer])
@pytest.mark.parametrize("before", [True, False])
def test_a_hook_gets_raster_order(family, make_hook, before):
    transformer = family.transformer()
    call = family.call(transformer, family.grid(*GRID), controlnet=True)
    expected = run(clear.linearize(transformer, 3, weights=None), call)
    hook = make_hook()
    if before:
        clear.restore(transformer)
    add_hook(transformer, hook)
    if before:
        clear.linearize(transformer, 3, weights=None)
    for _ in range(2):
        assert torch.equal(run(transformer, call), expected)
        assert torch.equal(joined(hook.outputs[-1]), expected)
        for name, value in call.items():
            torch.testing.assert_close(hook.inputs[-1][name], value, atol=0, rtol=0)


@each_family()
def test_hooks_are_added_and_removed(family):
    transformer = family.transformer()
    call = family.call(transformer, family.grid(*GRID))
    dense = run(transformer, call)
    expected = run(clear.linearize(transformer, 3, weights=None), call)
    first, second = Recorder(), Recorder()
    add_hook(transformer, first, "first")
    assert torch.equal(run(transformer, call), expected)
    add_hook(transformer, second, "second")
    assert torch.equal(run(transformer, call), expected)
    transformer._diffusers_hook.remove_hook("first")
    assert torch.equal(run(transformer, call), expected)
    transformer._diffusers_hook.remove_hook("second")
    assert torch.equal(run(transformer, call), expected)
    assert [len(hook.outputs) for hook in (first, second)] == [2, 2]
    add_hook(transformer, first, "first")
    assert torch.equal(run(transformer, call), expected)
    clear.restore(transformer)
    assert torch.equal(run(transformer, call), dense)
    transformer._diffusers_hook.remove_hook("first")
    assert transformer.forward == type(transformer).forward.__get__(transformer)


@each_family()
def test_restore_leaves_the_hook(family):
    transformer, hook = family.transformer(), Recorder()
    call = family.call(transformer, family.grid(*GRID))
    add_hook(transformer, hook)
    before, forward = snapshot(transformer), copy.copy(vars(hook.fn_ref))
    clear.linearize(transformer, 3, weights=None)
    run(transformer, call)
    clear.restore(transformer)
    assert_same(transformer, before)
    assert vars(hook.fn_ref) == forward


@pytest.mark.skipif(not hasattr(diffusers, "SeaCacheConfig"), reason="diffusers has SeaCache from 0.41 on")
@pytest.mark.parametrize("before", [True, False])
def test_sea_cache(before):
    """It skips the same steps as in a dense model, because its callback gets the same image."""
    grid, images = GRID, {"dense": [], "local": []}
    transformer = FLUX.transformer()
    calls = [
        {**FLUX.call(transformer, grid, seed=3), "timestep": torch.full((1,), sigma)} for sigma in (0.9, 0.8, 0.5, 0.1)
    ]

    def outputs(kind, model):
        found = []
        for step, call in enumerate(calls):
            settings = {"step_index": step, "num_inference_steps": len(calls), "sigma": float(call["timestep"])}
            with model.cache_context("cond", **settings):
                found.append(run(model, call))
        return found

    def config(kind):
        def take_image(module, args, kwargs):
            tokens = kwargs["hidden_states"]
            images[kind].append(tokens)
            return [tokens[0].T.unflatten(1, grid)[:, None]]

        return diffusers.SeaCacheConfig(threshold=10.0, raw_vision_callback=take_image)

    dense = FLUX.transformer()
    dense.enable_cache(config("dense"))
    outputs("dense", dense)
    if before:
        clear.linearize(transformer, 3, weights=None)
    transformer.enable_cache(config("local"))
    if not before:
        clear.linearize(transformer, 3, weights=None)
    cached = outputs("local", transformer)
    assert len(images["local"]) == len(images["dense"]) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(images["local"], images["dense"], strict=True))
    transformer.disable_cache()
    plain = outputs("local", transformer)
    assert torch.equal(cached[0], plain[0])
    assert not all(torch.equal(*pair) for pair in zip(cached, plain, strict=True))
    # A window that covers the image gives the dense model's numbers, skipped steps included.
    clear.linearize(transformer, 30, weights=None)
    transformer.enable_cache(config("local"))
    dense.disable_cache()
    dense.enable_cache(config("dense"))
    for ours, theirs in zip(outputs("local", transformer), outputs("dense", dense), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
