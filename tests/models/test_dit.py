"""What is special to DiT: class labels instead of text, square images, a variance."""

import copy
import math
import re

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from diffusers.models.attention_processor import AttnProcessor

import clear_attn as clear
from tests.helpers import dummy_models, families
from tests.helpers.reference_model import check_pipeline, run
from tests.helpers.snapshots import assert_same, snapshot


@pytest.fixture
def family():
    return families.DIT


@pytest.mark.parametrize("variant", families.DIT.variants)
def test_a_learned_variance_is_part_of_the_output(variant):
    transformer = clear.linearize(dummy_models.dit_transformer(**variant), 3, weights=None)
    side = 5 * transformer.config.patch_size
    output = run(transformer, dummy_models.dit_call(transformer, (5, 5)))
    assert output.shape == (1, transformer.config.out_channels, side, side)


def test_the_older_processor_is_restored(transformer):
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    call, before = dummy_models.dit_call(transformer, (6, 6)), snapshot(transformer)
    original = run(transformer, call)
    clear.linearize(transformer, 9, weights=None)
    torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)
    clear.restore(transformer)
    assert_same(transformer, before)


def small_pipeline(transformer):
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    )
    pipe = DiTPipeline(transformer, vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline():
    pipe = small_pipeline(dummy_models.dit_transformer(num_embeds_ada_norm=1000))  # class 1000 is no class

    def draw():
        output = pipe(
            [3, 7],
            guidance_scale=3.0,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        return torch.as_tensor(output.images)

    check_pipeline(pipe, [(8, 8)], draw)


def test_images_that_are_not_square(transformer):
    clear.linearize(transformer, 3, weights=None)
    call = dummy_models.dit_call(transformer, (4, 4))
    with pytest.raises(ValueError, match=r"must be square, got \[1, 4, 8, 4\]"):
        run(transformer, {**call, "hidden_states": call["hidden_states"][..., :4]})
    with pytest.raises(ValueError, match=r"multiples of 2, got \[1, 4, 7, 7\]"):
        run(transformer, {**call, "hidden_states": call["hidden_states"][..., :7, :7]})


def test_a_schedule_by_layer_but_not_by_sigma(transformer):
    before = snapshot(transformer)
    for name, value in (("dense_above_sigma", 0.9), ("windows_by_sigma", ((0.9, 5),))):
        words = re.escape(f"{name}={value} needs the share of noise, which a call of a DiT")
        with pytest.raises(ValueError, match=words):
            clear.linearize(transformer, 3, weights=None, schedule=clear.Schedule(**{name: value}))
    assert_same(transformer, before)
    call = dummy_models.dit_call(transformer, (8, 8))
    original = run(transformer, call)
    local = run(clear.linearize(transformer, 3, weights=None), call)
    clear.linearize(transformer, 3, weights=None, schedule=clear.Schedule(dense_layers=["transformer_blocks"]))
    torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)
    assert (local - original).abs().max() > 1e-3


def test_unsupported_features(transformer):
    with pytest.raises(ValueError, match="weights"):
        clear.linearize(transformer)
    with pytest.raises(TypeError, match="a DiTTransformer2DModel cannot be split over ranks"):
        clear.parallelize(clear.linearize(transformer, weights=None))
    with pytest.raises(TypeError, match="highres does not support a DiTPipeline"):
        clear.highres(small_pipeline(transformer), "a red circle", height=64, width=64)


def test_proportional_attention(transformer):
    call = dummy_models.dit_call(transformer, (6, 6))
    original = run(transformer, call)
    with clear.proportional_attention(transformer):
        scaled = run(transformer, call)
        assert (scaled - original).abs().max() > 1e-4
    clear.linearize(transformer, 9, weights=None)
    with clear.proportional_attention(transformer):
        torch.testing.assert_close(run(transformer, call), scaled, atol=1e-5, rtol=0)


class LinearProcessor:
    """A processor with LiT's attention in raster order: two heads and the convolution."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            to(hidden_states).unflatten(2, (2, -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        scores = query.relu() @ key.relu().transpose(2, 3)
        output = (scores / scores.sum(-1, keepdim=True) @ value).transpose(1, 2).flatten(2)
        image = value.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, 2 * [math.isqrt(value.shape[2])])
        convolved = torch.nn.functional.conv2d(image, self.kernel, padding=2, groups=len(self.kernel))
        return attn.to_out[0](output + convolved.flatten(2).transpose(1, 2))


def test_lit_is_saved_and_loaded(transformer, tmp_path):
    call, original = dummy_models.dit_call(transformer, (11, 11), batch=2), copy.deepcopy(transformer)
    before = run(transformer, call)
    clear.linearize(transformer, method=clear.methods.LiT(), weights=None)
    for block, plain in zip(transformer.transformer_blocks, original.transformer_blocks, strict=True):
        torch.nn.init.normal_(block.attn1.processor.convolution, std=0.3)
        plain.attn1.set_processor(LinearProcessor(block.attn1.processor.convolution.detach()))
    expected = run(original, call)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)
    assert (expected - before).abs().max() > 1e-2
    clear.save_pretrained(transformer, tmp_path)
    clear.restore(transformer)
    assert torch.equal(run(transformer, call), before)
    clear.linearize(transformer, weights=tmp_path)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


def test_cost(transformer):
    counted = clear.cost(transformer, 128, 128, window=3)
    assert counted.dense_step_flops == 4 * 32 * 3 * 64**2
    visible = [
        sum(y * y + x * x < 9 for y in range(-a, 8 - a) for x in range(-b, 8 - b)) for a in range(8) for b in range(8)
    ]
    assert counted.step_flops == 4 * 32 * 3 * sum(visible)
    clear.linearize(transformer, method=clear.methods.LiT(), weights=None)
    width = 32 // 2
    expected = 3 * 2 * 64 * 32 * (width + width + 5**2)
    assert clear.cost(transformer, 128, 128).step_flops == expected
