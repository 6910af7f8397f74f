"""What is special to SD3: images as input, dual attention, batched guidance, skipped layers."""

import pytest
import torch
from peft import LoraConfig

import clear_attn as clear
from clear_attn.core.layout import grid_permutation
from clear_attn.methods.clear import window_pairs
from tests.helpers import families
from tests.helpers.reference_model import run


@pytest.fixture
def transformer():
    return families.SD3.transformer()


def test_dual_attention_has_its_own_processors_and_weights(transformer):
    clear.linearize(transformer, 3, 2, weights=None)
    block = transformer.transformer_blocks[0]
    assert block.attn.processor is not block.attn2.processor
    assert "transformer_blocks.0.attn2.processor.spatial_weight" in transformer.state_dict()
    call = families.SD3.call(transformer, (11, 20))
    expected = run(transformer, call)
    with torch.no_grad():
        block.attn2.processor.spatial_weight.mul_(2)
    assert not torch.allclose(run(transformer, call), expected, atol=1e-5)


def test_positions_are_hooked_once_and_freed(transformer):
    for _ in range(2):
        clear.linearize(transformer, 3, weights=None)
        assert len(transformer.pos_embed._forward_hooks) == 1
    clear.restore(transformer)
    assert not transformer.pos_embed._forward_hooks


def test_fused_projections_are_normed(transformer):
    """diffusers' own processor for fused projections skips the norms of SD3.5, and fails in dual attention."""
    call = families.SD3.call(transformer, (11, 20))
    original = run(transformer, call)
    transformer.fuse_qkv_projections()
    clear.linearize(transformer, 30, weights=None)
    torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)


def test_sides_that_are_not_whole_tokens(transformer):
    clear.linearize(transformer, 3, weights=None)
    call = families.SD3.call(transformer, (11, 20))
    call["hidden_states"] = call["hidden_states"][..., :-1]
    with pytest.raises(ValueError, match=r"multiples of 2, got \[1, 4, 22, 39\]"):
        run(transformer, call)


def test_the_permutation_of_a_grid_is_that_of_its_layout():
    layout = clear.TokenLayout([(19, 34)], 5, text_first=False)
    assert torch.equal(layout.permutation, grid_permutation((19, 34), torch.device("cpu")))


def test_cost_counts_layers_without_text(transformer):
    counted = clear.cost(transformer, 128, 96, window=3, text_tokens=7)
    grid, text, dim = 8 * 6, 7, 32
    assert (counted.layers, counted.layers_without_text, clear.cost(transformer, 64, 64).text_tokens) == (4, 1, 333)
    assert counted.to_dict()["dense_step_gflops"] == 4 * dim * (3 * (grid + text) ** 2 + grid**2) / 1e9
    pairs = window_pairs((8, 6), 3)
    assert counted.step_flops == counted.flops(3 * (pairs + text * (2 * grid + text)) + pairs)


def test_a_lora_after_unfusing_projections(transformer):
    """After unfusing, diffusers leaves a flag on the layers, and the fused matrices."""
    call = families.SD3.call(transformer, (11, 20))
    transformer.fuse_qkv_projections()
    transformer.unfuse_qkv_projections()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    original = run(transformer, call)
    clear.linearize(transformer, 30, weights=None)
    torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)


def test_unfusing_after_restore_keeps_the_original_processors(transformer):
    call = families.SD3.call(transformer, (11, 20))
    original = run(transformer, call)
    clear.linearize(transformer, 4, weights=None)
    transformer.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="replaced by a FusedJointAttnProcessor2_0"):
        run(transformer, call)
    clear.linearize(transformer, 4, weights=None)
    clear.restore(transformer)
    transformer.unfuse_qkv_projections()
    assert torch.equal(run(transformer, call), original)


def test_pooled_weights_are_not_cast_to_float8(transformer):
    transformer = families.SD3.transformer(dual=False)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    clear.linearize(transformer, 4, 3, weights=None)
    assert transformer.transformer_blocks[0].attn.processor.spatial_weight.dtype == torch.float32
    assert run(transformer, families.SD3.call(transformer, (11, 20))).isfinite().all()


def test_restoring_leaves_nothing_on_the_processors(transformer):
    processor = transformer.transformer_blocks[0].attn.processor
    clear.restore(clear.linearize(transformer, 4, weights=None))
    assert transformer.transformer_blocks[0].attn.processor is processor
    assert not vars(processor)
