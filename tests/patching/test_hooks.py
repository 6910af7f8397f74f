"""The entry hook and the exit hook, called directly."""

import inspect

import pytest
import torch

import clear_attn as clear
from clear_attn import Schedule, methods
from clear_attn.models import adapter_for
from clear_attn.models.context.context import CONTEXT, ClearContext
from clear_attn.patching.hooks import EntryHook, ExitHook
from clear_attn.patching.target import entry_hook_of
from tests.helpers import dummy_models
from tests.helpers.families import FLUX, each_family
from tests.helpers.reference_model import run

GRID = (9, 20)


@pytest.fixture
def transformer():
    return clear.linearize(dummy_models.flux_transformer(), 3, weights=None)


def enter(transformer, call):
    """Call the entry hook; return its keywords and their context."""
    args, kwargs = entry_hook_of(transformer)(transformer, (), call)
    assert args == ()
    return kwargs, kwargs["joint_attention_kwargs"][CONTEXT]


def test_image_tokens_are_permuted_and_text_is_not(transformer):
    call = FLUX.call(transformer, GRID, controlnet=True)
    kwargs, context = enter(transformer, call)
    permutation = context.layout.permutation
    assert not torch.equal(permutation, torch.arange(len(permutation)))
    assert torch.equal(kwargs["hidden_states"], call["hidden_states"][:, permutation])
    assert torch.equal(kwargs["img_ids"], call["img_ids"][permutation])
    assert torch.equal(kwargs["controlnet_block_samples"][1], call["controlnet_block_samples"][1][:, permutation])
    assert kwargs["encoder_hidden_states"] is call["encoder_hidden_states"]


def test_positional_arguments_become_keywords(transformer):
    call = FLUX.call(transformer, GRID)
    names = [name for name in inspect.signature(transformer.forward).parameters if name in call]
    _, kwargs = entry_hook_of(transformer)(transformer, (call["hidden_states"],), {n: call[n] for n in names[1:]})
    assert kwargs["hidden_states"].shape == call["hidden_states"].shape


def test_the_exit_hook_undoes_the_permutation(transformer):
    call = FLUX.call(transformer, GRID)
    kwargs, _ = enter(transformer, call)
    exit_hook = next(hook for hook in transformer._forward_hooks.values() if isinstance(hook, ExitHook))
    output = exit_hook(transformer, (), kwargs, {"sample": kwargs["hidden_states"], "other": [3]})
    assert torch.equal(output["sample"], call["hidden_states"])
    assert output["other"] == [3]


def test_settings_of_the_call_are_taken_out_of_its_keywords(transformer):
    call = FLUX.call(transformer, GRID)
    call["joint_attention_kwargs"] = {"clear_scale_multiplier": 1.5, "clear_role": "student", "scale": 0.5}
    kwargs, context = enter(transformer, call)
    assert isinstance(context, ClearContext)
    assert (context.scale_multiplier, context.role, context.record) == (1.5, "student", None)
    assert kwargs["joint_attention_kwargs"] == {"scale": 0.5, CONTEXT: context}


def test_calls_of_one_size_share_layout_and_plans_but_no_context(transformer):
    (_, first), (_, second) = (enter(transformer, FLUX.call(transformer, GRID, seed=seed)) for seed in (0, 1))
    assert first is not second
    assert first.layout is second.layout
    assert [group.plan for group in first.groups] == [group.plan for group in second.groups]
    assert enter(transformer, FLUX.call(transformer, (4, 5)))[1].layout is not first.layout


def test_a_group_has_the_method_that_the_schedule_gives():
    schedule = Schedule(dense_above_sigma=0.5, windows={"transformer_blocks.1": 6})
    transformer = clear.linearize(dummy_models.flux_transformer(), 3, weights=None, schedule=schedule)
    hook = entry_hook_of(transformer)
    assert hook.groups["transformer_blocks.0.attn"] == hook.groups["single_transformer_blocks.0.attn"]
    assert hook.groups["transformer_blocks.0.attn"] != hook.groups["transformer_blocks.1.attn"]
    call = FLUX.call(transformer, GRID)
    local = hook.methods_of({**call, "timestep": torch.tensor([0.4])})
    assert local[hook.groups["transformer_blocks.0.attn"]] == methods.Clear(3)
    assert local[hook.groups["transformer_blocks.1.attn"]] == methods.Clear(6)
    noisy = {**call, "timestep": torch.tensor([0.6])}
    assert {type(method) for method in hook.methods_of(noisy)} == {methods.Dense}
    assert hook.method_of({**call, "timestep": torch.tensor([0.4])}) == methods.Clear(3)


def test_layers_without_text_have_a_plan_without_text():
    transformer = clear.linearize(dummy_models.sd3_transformer(), 3, weights=None)
    _, kwargs = entry_hook_of(transformer)(transformer, (), dummy_models.sd3_call(transformer, GRID))
    groups = kwargs["joint_attention_kwargs"][CONTEXT].groups
    assert sorted(group.plan.text_tokens for group in groups) == [0, 7]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_backend_is_selected_for_all_layers_at_once(transformer, needs_grad, monkeypatch):
    asked = []

    def select(device, dtype, head_dim, needs_grad):
        asked.append((device.type, dtype, head_dim, needs_grad))
        return type("Choice", (), {"backend": "reference"})

    monkeypatch.setattr("clear_attn.patching.hooks.select_backend", select)
    transformer.requires_grad_(needs_grad)
    _, context = enter(transformer, FLUX.call(transformer, GRID))
    assert context.backend == "reference"
    assert asked == [("cpu", torch.float32, 16, needs_grad)]


def test_a_copy_with_a_sharder_has_its_own_cache(transformer):
    hook, sharder = entry_hook_of(transformer), object()
    other = hook.with_sharder(sharder)
    assert (other.sharder, hook.sharder) == (sharder, None)
    assert other.cache is not hook.cache
    assert other.groups is hook.groups


def test_a_missing_inner_hook_is_found():
    transformer = clear.linearize(dummy_models.sd3_transformer(), 3, weights=None)
    hook = entry_hook_of(transformer)
    assert isinstance(hook, EntryHook)
    hook.validate_installed(transformer)
    transformer.pos_embed._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="a PatchEmbed of this SD3Transformer2DModel was replaced"):
        hook.validate_installed(transformer)


@each_family()
def test_a_users_hook_on_a_block_gets_tile_order(family):
    """The documentation explains how to undo the permutation."""
    transformer, seen = family.transformer(), []
    grid = family.grid(*GRID)
    call = family.call(transformer, grid)
    first, *_ = adapter_for(transformer).attention_layers(transformer)
    transformer.get_submodule(first.rpartition(".")[0]).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args + tuple(kwargs.values()))[0]), with_kwargs=True
    )
    run(transformer, call)
    run(clear.linearize(transformer, 3, weights=None), call)
    layout = clear.TokenLayout([grid], 0)
    text = seen[0].shape[1] - layout.image_tokens  # of a model whose blocks get one sequence
    image = clear.TokenLayout([grid], text, text_first=adapter_for(transformer).text_first).image
    dense, local = (x[:, image] for x in seen)
    assert not torch.equal(local, dense)
    torch.testing.assert_close(local[:, layout.inverse_permutation], dense, atol=1e-6, rtol=0)
    torch.testing.assert_close(local, dense[:, layout.permutation], atol=1e-6, rtol=0)


def test_a_call_that_lost_its_context_is_refused(transformer):
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "joint_attention_kwargs": None}), with_kwargs=True
    )
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    with pytest.raises(RuntimeError, match="called without its context: a forward pre-hook has changed joint_att"):
        run(transformer, FLUX.call(transformer, GRID))
