"""States of a transformer: captured, applied, and applied again after an interruption."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import clear_attn as clear
from clear_attn.patching import state
from clear_attn.patching.hooks import EntryHook, ExitHook
from clear_attn.patching.target import find_target
from clear_attn.weights.parameters import replaced_parameters
from tests.helpers.families import each_family
from tests.helpers.snapshots import assert_same, layers_of, snapshot


def hooks_of_ours(transformer):
    tables = transformer._forward_pre_hooks, transformer._forward_hooks
    return [
        type(hook).__name__ for table in tables for hook in table.values() if isinstance(hook, EntryHook | ExitHook)
    ]


@each_family()
def test_a_captured_state_can_be_applied(transformer, checkpoint):
    before = snapshot(transformer)
    captured = state.capture(find_target(transformer), load_file(checkpoint).keys() & replaced_of(transformer).keys())
    clear.linearize(transformer, 3, weights=checkpoint)
    state.apply(find_target(transformer), captured)
    assert_same(transformer, before)


def replaced_of(transformer):
    return replaced_parameters(layers_of(transformer))


def test_captured_values_are_copies_of_the_named_parameters_only(transformer):
    name = next(iter(replaced_of(transformer)))
    captured = state.capture(find_target(transformer), [name])
    assert (captured.hook, captured.metadata, list(captured.values)) == (None, None, [name])
    with torch.no_grad():
        replaced_of(transformer)[name].add_(1)
    assert not torch.equal(captured.values[name], replaced_of(transformer)[name])


def test_a_linearized_state_can_be_applied_after_a_restore(family, transformer, checkpoint):
    call = family.call(transformer, (5, 9))
    clear.linearize(transformer, 3, weights=checkpoint)
    expected, before = transformer(**call).sample, snapshot(transformer)
    captured = state.capture(find_target(transformer), replaced_of(transformer))
    clear.restore(transformer)
    state.apply(find_target(transformer), captured)
    after = snapshot(transformer)
    assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())
    assert (after["processors"], after["config"]) == (before["processors"], before["config"])
    assert torch.equal(transformer(**call).sample, expected)


@pytest.mark.parametrize("step", ["copy_values", "match_device_and_dtype", "_set_metadata", "_remove_hooks_of_ours"])
def test_an_interrupted_restore_can_be_repeated(transformer, checkpoint, monkeypatch, step):
    before = snapshot(transformer)
    clear.linearize(transformer, 3, weights=checkpoint)
    target = find_target(transformer)
    original = state.original_state(target)
    with monkeypatch.context() as patched:
        patched.setattr(state, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            state.apply(target, original)
    assert hooks_of_ours(transformer) == ["EntryHook", "ExitHook"]  # so that the partial state is detected
    state.apply(target, original)
    assert_same(transformer, before)


def test_the_original_state_keeps_processors_of_others(transformer):
    processors = find_target(transformer).processors
    clear.linearize(transformer, 3, weights=None)
    layer, *others = processors
    foreign = type(processors[layer])()
    layers_of(transformer)[layer].set_processor(foreign)
    original = state.original_state(find_target(transformer))
    assert original.processors[layer] is foreign
    assert all(original.processors[other] is processors[other] for other in others)


def test_discarded_originals_are_an_error(transformer, checkpoint):
    clear.linearize(transformer, 3, weights=checkpoint, keep_original=False)
    with pytest.raises(RuntimeError, match="were discarded by linearize"):
        state.original_state(find_target(transformer))


def test_hooks_are_replaced_where_they_are(transformer):
    clear.linearize(transformer, 3, weights=None)
    transformer.register_forward_pre_hook(lambda *_: None)
    order = list(transformer._forward_pre_hooks)
    hook = copy.copy(find_target(transformer).hook)
    state.install_hooks(transformer, hook)
    assert list(transformer._forward_pre_hooks) == order
    assert find_target(transformer).hook is hook
    assert hooks_of_ours(transformer) == ["EntryHook", "ExitHook"]


def test_a_processor_takes_the_dtype_of_its_layer(transformer):
    clear.linearize(transformer, 3, 2, weights=None)
    attn = next(iter(layers_of(transformer).values()))
    attn.to(torch.bfloat16)
    attn.processor.float()
    assert state.match_device_and_dtype(attn.processor, attn) is attn.processor
    assert attn.processor.spatial_weight.dtype == torch.bfloat16


def test_values_that_cannot_be_written_are_found_first(transformer, checkpoint):
    clear.linearize(transformer, 3, weights=checkpoint)
    target = find_target(transformer)
    original = state.original_state(target)
    state.check_writable(target, original)
    transformer.to("meta")
    with pytest.raises(RuntimeError, match="are on the meta device"):
        state.check_writable(find_target(transformer), original)
    state.check_writable(find_target(transformer), original._replace(values={}))
