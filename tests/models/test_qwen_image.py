"""What is special to Qwen-Image: padded text, grids from `img_shapes`."""

import pytest
import torch
from diffusers import (
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
)
from PIL import Image

import clear_attn as clear
from tests.helpers import dummy_models, dummy_pipelines, families, hardware
from tests.helpers.dummy_controlnets import fill_zeros
from tests.helpers.reference_model import check_pipeline, in_raster_order, run
from tests.helpers.snapshots import assert_same, snapshot

pytestmark = families.needs("qwen")


@pytest.fixture
def family():
    return families.QWEN


@pytest.mark.parametrize("backend", hardware.BACKENDS)
@pytest.mark.parametrize("changes", [{}, {"use_layer3d_rope": True}], ids=["references", "layers"])
def test_padded_text_has_no_effect(changes, backend):
    """Each text of a batch gives the output of a call with that text alone, without padding."""
    transformer, grids = dummy_models.qwen_transformer(**changes), [(13, 7), (9, 9)]
    call = dummy_models.qwen_call(transformer, *grids, text=9, batch=3, padded=(0, 3, 8))
    expected = run(in_raster_order(transformer, grids, clear.methods.Clear(4, 2)), call)
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    output = run(transformer, call)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    for row, length in enumerate((9, 6, 1)):
        alone = {**dummy_models.qwen_call(transformer, *grids), "timestep": call["timestep"][:1]}
        alone["hidden_states"] = call["hidden_states"][row : row + 1]
        alone["encoder_hidden_states"] = call["encoder_hidden_states"][row : row + 1, :length]
        torch.testing.assert_close(run(transformer, alone), output[row : row + 1], atol=1e-5, rtol=0)


def test_padding_of_any_pattern_and_its_gradients(transformer):
    call = dummy_models.qwen_call(transformer, (5, 8), text=4, batch=2, padded=(1, 1))
    call["encoder_hidden_states_mask"] = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]])
    call["encoder_hidden_states"].requires_grad_()
    reference = in_raster_order(transformer, [(5, 8)], clear.methods.Clear(3))

    def gradient(model):
        return torch.autograd.grad(model(**call).sample.square().mean(), call["encoder_hidden_states"])[0]

    expected = gradient(reference)
    clear.linearize(transformer, 3, weights=None)
    ours = gradient(transformer)
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-5)
    assert not ours[call["encoder_hidden_states_mask"] == 0].any()


def test_padding_in_half_precision():
    transformer = dummy_models.qwen_transformer().bfloat16()
    call = dummy_models.qwen_call(transformer, (5, 8), text=9, batch=2, padded=(0, 6))
    call = {name: x.bfloat16() if getattr(x, "is_floating_point", bool)() else x for name, x in call.items()}
    original = run(transformer, call)
    clear.linearize(transformer, 20, weights=None)
    torch.testing.assert_close(run(transformer, call), original, atol=3e-2, rtol=0)
    shorter = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
    shorter["encoder_hidden_states"][1, 3:] = 50  # values of padding must not matter
    assert torch.equal(run(transformer, shorter), run(transformer, call))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_shapes": None}, "img_shapes must give .* got None"),
        ({"img_shapes": [[(1, 4, 5)]]}, "img_shapes have 20 image tokens, hidden_states has 24"),
        ({"img_shapes": [[(1, 4, 6)], [(1, 6, 4)]]}, "img_shapes must be the same for the whole batch"),
        (
            {"encoder_hidden_states_mask": torch.ones(1, 6)},
            r"encoder_hidden_states_mask must be \[1, 7\], got \[1, 6\]",
        ),
    ],
)
def test_calls_that_do_not_fit(transformer, change, words):
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(ValueError, match=words):
        run(transformer, {**dummy_models.qwen_call(transformer, (4, 6)), **change})


def settings_of(**text):
    size = {"height": 13 * 16, "width": 7 * 16}
    return {**dummy_pipelines.qwen_text(**text), **size, "num_inference_steps": 2, "output_type": "latent"}


def an_image(height, width):
    return Image.effect_mandelbrot((width, height), (-2, -1, 1, 1), 50).convert("RGB")


def test_pipeline_with_guidance_and_padded_text():
    pipe = dummy_pipelines.qwen(QwenImagePipeline)
    call = settings_of(batch=2, padded=4)
    check_pipeline(pipe, [(13, 7)], lambda: pipe(**call, generator=torch.Generator().manual_seed(0)).images)


def test_image_to_image():
    pipe, call = dummy_pipelines.qwen(QwenImageImg2ImgPipeline), settings_of()
    call |= {"image": an_image(208, 112), "strength": 1.0}
    check_pipeline(pipe, [(13, 7)], lambda: pipe(**call, generator=torch.Generator().manual_seed(0)).images)


def test_edit_with_a_reference_image(monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit

    monkeypatch.setattr(edit, "VAE_IMAGE_SIZE", 8 * 16 * 8 * 16)
    pipe, call = dummy_pipelines.qwen(QwenImageEditPlusPipeline, processor=None), settings_of()
    call["image"] = [an_image(128, 128)]
    check_pipeline(pipe, [(13, 7), (8, 8)], lambda: pipe(**call, generator=torch.Generator().manual_seed(0)).images)


class TestControlNet:
    def build(self):
        torch.manual_seed(5)
        return fill_zeros(QwenImageControlNetModel(**{**dummy_models.QWEN_CONFIG, "num_layers": 2}))

    def test_equals_the_rule_in_raster_order(self):
        controlnet = self.build()
        call = dummy_models.qwen_call(controlnet, (13, 7), batch=2, padded=(0, 3))
        call["controlnet_cond"] = call["hidden_states"].flip(1)
        original = run(controlnet, call)
        before = snapshot(controlnet)
        expected = run(in_raster_order(controlnet, [(13, 7)], clear.methods.Clear(4, 2)), call)
        clear.linearize(controlnet, 4, 2, weights=None)
        torch.testing.assert_close(run(controlnet, call), expected, atol=1e-5, rtol=0)
        clear.restore(controlnet)
        assert_same(controlnet, before)
        assert torch.equal(run(controlnet, call), original)

    def test_gradients_under_checkpointing(self):
        controlnet = self.build()
        call = dummy_models.qwen_call(controlnet, (6, 5))
        call["controlnet_cond"] = call["hidden_states"].flip(1).requires_grad_()

        def gradient(model):
            samples = model(**call).controlnet_block_samples
            return torch.autograd.grad(sum(x.square().mean() for x in samples), call["controlnet_cond"])[0]

        expected = gradient(in_raster_order(controlnet, [(6, 5)], clear.methods.Clear(3)))
        clear.linearize(controlnet, 3, weights=None).enable_gradient_checkpointing()
        torch.testing.assert_close(gradient(controlnet.train()), expected, atol=1e-6, rtol=1e-5)

    def test_pipeline(self):
        pipe, call = dummy_pipelines.qwen(QwenImageControlNetPipeline, controlnet=self.build()), settings_of()
        call |= {"control_image": an_image(208, 112), "controlnet_conditioning_scale": 1.0}
        check_pipeline(pipe, [(13, 7)], lambda: pipe(**call, generator=torch.Generator().manual_seed(0)).images)
        assert "ControlNet 1, dense" in str(clear.cost(pipe, 208, 112, window=3))


def test_unsupported_features(transformer):
    with pytest.raises(ValueError, match="finds none for this model, a QwenImageTransformer2DModel; give weights=None"):
        clear.linearize(transformer, 8)
