"""Offloading, casting, sharing and copying transformers, before and after linearizing."""

import copy

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from safetensors.torch import save_file

import clear_attn as clear
from clear_attn.models._diffusers import load_pretrained
from tests.helpers.placement import as_a_whole, by_group, nothing, to_eight_bits
from tests.helpers.reference_model import run
from tests.helpers.snapshots import assert_same, checkpoint_for, snapshot

# An operation, and one with the same effect on the numbers.
ARRANGEMENTS = {
    "model": (as_a_whole, nothing),
    "block": (by_group("block_level"), nothing),
    "leaf": (by_group("leaf_level"), nothing),
    "eight-bits": (to_eight_bits, to_eight_bits),
}


@pytest.mark.parametrize(("arrange", "same"), ARRANGEMENTS.values(), ids=ARRANGEMENTS)
@pytest.mark.parametrize("first", ["arrange", "linearize"])
def test_offloading_and_casting_before_and_after(family, transformer, checkpoint, arrange, same, first):
    call = family.call(transformer, (11, 20))
    plain = family.transformer()
    same(plain)
    original = run(plain, call)
    expected = run(clear.linearize(plain, 4, weights=checkpoint), call)
    if first == "arrange":
        arrange(transformer)
        clear.linearize(transformer, 4, weights=checkpoint)
    else:
        clear.linearize(transformer, 4, weights=checkpoint)
        arrange(transformer)
    torch.testing.assert_close(run(transformer, call), expected)
    clear.restore(transformer)
    torch.testing.assert_close(run(transformer, call), original)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}])
def test_loading_options(options, flux_folder, tmp_path):
    pipe = load_pretrained(FluxPipeline, flux_folder, dtype=torch.bfloat16, **options)
    save_file(checkpoint_for(pipe.transformer.float(), 2), tmp_path / "weights.safetensors")
    pipe.transformer.bfloat16()
    clear.linearize(pipe, 4, weights=tmp_path / "weights.safetensors")
    assert {x.dtype for x in pipe.transformer.parameters()} == {torch.bfloat16}
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red circle", height=32, width=32, num_inference_steps=1, max_sequence_length=24, output_type="latent"
    ).images
    assert image.isfinite().all()


def test_pipelines_that_share_a_transformer_are_one(pipe):
    other = FluxImg2ImgPipeline(**pipe.components)
    before = snapshot(pipe.transformer)
    clear.linearize(pipe, 4, weights=None)
    assert clear.is_linearized(other)
    clear.linearize(other, 5, weights=None)
    assert clear.cost(pipe, 128, 128).method.window == 5
    clear.restore(other)
    assert not clear.is_linearized(pipe)
    assert_same(pipe.transformer, before)


def test_nested_blocks(family, transformer, checkpoint):
    call = family.call(transformer, (11, 20))
    before = snapshot(transformer)
    with clear.linearized(transformer, 4, weights=checkpoint):
        outer = run(transformer, call)
        with clear.linearized(transformer, 6, 3, weights=None):
            with clear.linearized(transformer, 2, weights=checkpoint):
                assert clear.cost(transformer, 64, 64).method.window == 2
            assert clear.cost(transformer, 64, 64).method.window == 6
        assert torch.equal(run(transformer, call), outer)
    assert_same(transformer, before)


def test_a_deep_copy_has_its_own_original(family, transformer, checkpoint):
    call = family.call(transformer, (11, 20))
    original = run(transformer, call)
    clear.linearize(transformer, 4, weights=checkpoint)
    twin = copy.deepcopy(transformer)
    clear.restore(transformer)
    assert clear.is_linearized(twin)
    clear.restore(twin)
    assert torch.equal(run(twin, call), original)
    assert torch.equal(run(transformer, call), original)


def test_discarded_originals_are_freed(transformer, checkpoint):
    clear.linearize(transformer, 4, weights=checkpoint, keep_original=False)
    hook = next(iter(transformer._forward_pre_hooks.values()))
    assert not hook.original.values
