"""What is special to Chroma: a mask for the padding of the text."""

import diffusers
import pytest
import torch
from PIL import Image

import clear_attn as clear
from tests.helpers import dummy_models, dummy_pipelines, families, hardware
from tests.helpers.reference_model import check_pipeline, in_raster_order, run


@pytest.fixture
def family():
    return families.CHROMA


@pytest.mark.parametrize("backend", hardware.BACKENDS)
def test_each_text_has_its_own_padding(backend, transformer):
    call = dummy_models.chroma_call(transformer, (13, 7), text=9, batch=3, padded=(0, 3, 8))
    expected = run(in_raster_order(transformer, [(13, 7)], clear.methods.Clear(4, 2)), call)
    without = run(in_raster_order(transformer, [(13, 7)], clear.methods.Clear(4, 2)), {**call, "attention_mask": None})
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)
    assert (expected - without).abs().max() > 1e-3
    torch.testing.assert_close(run(transformer, {**call, "attention_mask": None}), without, atol=1e-5, rtol=0)


def test_a_boolean_mask_removes_padding(transformer):
    call = dummy_models.chroma_call(transformer, (6, 5), text=9, padded=[4], dtype=torch.bool)
    clear.linearize(transformer, 3, weights=None)
    shorter = {**call, "encoder_hidden_states": call["encoder_hidden_states"][:, :5], "txt_ids": torch.zeros(5, 3)}
    expected = run(transformer, {**shorter, "attention_mask": None})
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


def test_a_mask_in_half_precision():
    transformer = dummy_models.chroma_transformer().bfloat16()
    call = dummy_models.chroma_call(transformer, (6, 5), text=30, padded=[20])
    call = {name: x if "ids" in name else x.bfloat16() for name, x in call.items()}
    original = run(transformer, call)
    clear.linearize(transformer, 20, weights=None)
    torch.testing.assert_close(run(transformer, call), original, atol=3e-2, rtol=0)


def test_masks_that_do_not_fit(transformer):
    call = dummy_models.chroma_call(transformer, (4, 6))
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 31\], got \[1, 30\]"):
        run(transformer, {**call, "attention_mask": call["attention_mask"][:, 1:]})
    with pytest.raises(ValueError, match="attention_mask must be 1 for all 24 image tokens"):
        run(transformer, {**call, "attention_mask": call["attention_mask"].roll(1, 1).flip(1)})


@pytest.mark.parametrize("name", ["ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"])
def test_pipelines_with_guidance(name):
    kind = getattr(diffusers, name, None) or pytest.skip(f"this diffusers has no {name}")
    pipe = dummy_pipelines.chroma(kind)
    side = 2 * pipe.vae_scale_factor
    image = Image.effect_mandelbrot((9 * side, 7 * side), (-2, -1, 1, 1), 50).convert("RGB")
    # ChromaInpaintPipeline of diffusers 0.42.1 reads this entry, which the model's config does not have.
    pipe.transformer.register_to_config(guidance_embeds=False)
    further = {
        "ChromaPipeline": {},
        "ChromaImg2ImgPipeline": {"image": image, "strength": 1.0},
        "ChromaInpaintPipeline": {"image": image, "mask_image": image.convert("L"), "strength": 1.0},
    }[name]

    def draw():
        return pipe(
            ["a red circle", "a white cross on a black ground"],
            negative_prompt=["blue", ""],
            height=7 * side,
            width=9 * side,
            max_sequence_length=20,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **further,
        ).images

    check_pipeline(pipe, [(7, 9)], draw)


def test_unsupported_features(transformer):
    refused = pytest.raises(RuntimeError, match=r"a FluxAttnProcessor, whose scores .* cannot scale while")
    with refused, clear.proportional_attention(transformer):
        pass


def test_a_layer_outside_a_call(transformer):
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(RuntimeError, match="called outside a call of its linearized transformer"):
        transformer.transformer_blocks[0].attn(torch.randn(1, 4, 32), torch.randn(1, 2, 32))
