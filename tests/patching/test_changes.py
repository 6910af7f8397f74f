"""Changes of a linearized pipeline by others are not lost without a warning."""

import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

import clear_attn as clear
from clear_attn.patching.context_managers import restored
from tests.helpers.snapshots import assert_same, checkpoint_for, layers_of, snapshot, train


@pytest.fixture
def weights(transformer, tmp_path):
    save_file(checkpoint_for(transformer, 2), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def fuse_and_unload_lora(transformer):
    """Fuse a LoRA and unload it."""
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    transformer.fuse_lora()
    transformer.unload_lora()


def load_other_values(transformer):
    state = {name: value + 0.01 * torch.randn(value.shape) for name, value in transformer.state_dict().items()}
    transformer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_and_unfusing_a_lora_is_not_a_change(transformer, weights, dtype):
    clear.linearize(transformer.to(dtype), weights=weights)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=0.1, target_modules=["to_q"], init_lora_weights=False))
    transformer.fuse_lora()
    transformer.unfuse_lora()
    transformer.unload_lora()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clear.restore(transformer)


CHANGES = {"LoRA fused and unloaded": fuse_and_unload_lora, "state dict loaded": load_other_values, "trained": train}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("operation", [clear.restore, lambda model: clear.linearize(model, weights=None)])
def test_changed_values_that_would_be_lost_are_named(transformer, weights, change, operation):
    clear.linearize(transformer, weights=weights)
    change(transformer)
    with pytest.warns(UserWarning, match=r"attention parameters \(.*to_q.*changed since clear_attn.linearize"):
        operation(transformer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moving_is_not_a_change(transformer, weights, dtype):
    before = snapshot(transformer)
    clear.linearize(transformer, weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clear.linearize(transformer.to(dtype), weights=weights)
        clear.restore(transformer)
    # Originals are restored unrounded; parameters that were not replaced were rounded by the user's casts.
    after, replaced = snapshot(transformer.float()), checkpoint_for(transformer)
    for name, value in before["state"].items():
        if name in replaced:
            assert torch.equal(after["state"][name], value.to(dtype).float()), name


def test_originals_are_restored_unrounded_after_casts(transformer, weights):
    before = snapshot(transformer)["state"]
    clear.linearize(transformer, weights=weights)
    clear.restore(transformer.to(torch.bfloat16).float())
    after, replaced = transformer.state_dict(), checkpoint_for(transformer)
    assert all(torch.equal(after[name], before[name]) for name in replaced)
    others = [name for name in before if name not in replaced and before[name].is_floating_point()]
    assert any(not torch.equal(after[name], before[name]) for name in others)


def test_no_warning_without_distilled_weights(transformer):
    clear.linearize(transformer, 3, weights=None)
    fuse_and_unload_lora(transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clear.restore(transformer)


@pytest.mark.parametrize("frozen", [True, False])
def test_pooled_weights_are_trainable_if_the_layer_is(transformer, frozen):
    transformer.requires_grad_(not frozen)
    clear.linearize(transformer, 3, 2, weights=None)
    own = [value for attn in layers_of(transformer).values() for value in attn.processor.parameters()]
    assert own
    assert all(value.requires_grad is not frozen for value in own)


def test_untrained_models_are_not_saved(transformer, tmp_path):
    clear.linearize(transformer, 3, 2, weights=None)
    before = snapshot(transformer)
    with pytest.raises(RuntimeError, match="nothing was trained since, so there is nothing to save"):
        clear.save_pretrained(transformer, tmp_path / "saved")
    assert_same(transformer, before)
    assert not (tmp_path / "saved").exists()
    train(transformer)
    clear.save_pretrained(transformer, tmp_path / "saved")


def test_trained_pooled_weights_are_saved(transformer, tmp_path):
    clear.linearize(transformer, 3, 2, weights=None)
    next(iter(layers_of(transformer).values())).processor.spatial_weight.data.mul_(1.1)
    clear.save_pretrained(transformer, tmp_path / "saved")


@pytest.mark.parametrize("block", [restored, lambda model: clear.linearized(model, 4, weights=None)])
def test_a_with_block_restores_changes_and_does_not_warn(transformer, weights, block):
    clear.linearize(transformer, weights=weights)
    train(transformer)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with block(transformer):
            pass
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
