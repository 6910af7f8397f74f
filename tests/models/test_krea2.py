"""What is particular to Krea 2: padded text, positions of text and image together, gates, shared key heads."""

import inspect

import pytest
import torch

import clear_attn as clear
from clear_attn.models import training_adapter_for
from tests.helpers import dummy_models, dummy_pipelines, families, hardware
from tests.helpers.reference_model import check_pipeline, in_raster_order, run
from tests.helpers.snapshots import snapshot

krea2 = pytest.importorskip("diffusers.models.transformers.transformer_krea2")
GRID = (13, 7)


@pytest.fixture
def family():
    return families.KREA2


@pytest.mark.parametrize("backend", hardware.BACKENDS)
def test_each_text_has_its_own_padding(backend, transformer):
    """The output of each image is that of the image alone, with its text without padding."""
    call = dummy_models.krea2_call(transformer, GRID, text=9, batch=3, padded=(0, 3, 8))
    expected = run(in_raster_order(transformer, [GRID], clear.methods.Clear(4, 2)), call)
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    output = run(transformer, call)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    for row, length in enumerate((9, 6, 1)):
        alone = dummy_models.krea2_call(transformer, GRID, text=length)
        alone["hidden_states"] = call["hidden_states"][row : row + 1]
        alone["encoder_hidden_states"] = call["encoder_hidden_states"][row : row + 1, :length]
        torch.testing.assert_close(run(transformer, alone), output[row : row + 1], atol=1e-5, rtol=0)


def test_padding_in_the_middle(transformer):
    """As in the pipeline, which pads before the template's last tokens."""
    call = dummy_models.krea2_call(transformer, GRID, text=9)
    call["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1, 1]]).bool()
    expected = run(in_raster_order(transformer, [GRID], clear.methods.Clear(4)), call)
    clear.linearize(transformer, 4, weights=None)
    output = run(transformer, call)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    other = call["encoder_hidden_states"].clone()
    other[:, 3:7] = 50
    torch.testing.assert_close(run(transformer, {**call, "encoder_hidden_states": other}), output, atol=1e-5, rtol=0)


def test_text_fusion_keeps_its_own_attention(transformer):
    clear.linearize(transformer, 3, 2, weights=None)
    kinds = {name.split(".")[0]: type(processor).__name__ for name, processor in transformer.attn_processors.items()}
    assert kinds == {"text_fusion": "Krea2AttnProcessor", "transformer_blocks": "Krea2Processor"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_in_half_precision_are_counted_again(transformer, dtype):
    """Columns past 256 are different positions, though bfloat16 has one number for two of them."""
    call = dummy_models.krea2_call(transformer, (2, 300))
    clear.linearize(transformer, 5, weights=None)
    expected = run(transformer, call)
    coarse = {**call, "position_ids": call["position_ids"].to(dtype)}
    assert torch.equal(run(transformer, coarse), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_ids": torch.zeros(7, 3)}, r"position_ids must be \[text and image tokens, 3 or more\]"),
        (
            {"position_ids": torch.cat([torch.zeros(7, 3), dummy_models.image_ids((4, 5))])},
            "has 20 image tokens after 7 text",
        ),
        (
            {"encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool)},
            r"encoder_attention_mask must be \[1, 7\], got \[1, 6\]",
        ),
    ],
)
def test_calls_that_do_not_fit(transformer, change, words):
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(ValueError, match=words):
        run(transformer, {**dummy_models.krea2_call(transformer, (4, 6)), **change})


def test_a_schedule(transformer):
    call = dummy_models.krea2_call(transformer, GRID)
    original = run(transformer, call)
    schedule = clear.Schedule(dense_above_sigma=0.5)
    clear.linearize(transformer, 3, weights=None, schedule=schedule)
    torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)
    late = {**call, "timestep": torch.tensor([0.3])}
    local = run(transformer, late)
    clear.restore(transformer)
    expected = run(in_raster_order(transformer, [GRID], clear.methods.Clear(3)), late)
    torch.testing.assert_close(local, expected, atol=1e-5, rtol=0)


def test_pipeline_with_guidance_and_padded_text():
    pipe = dummy_pipelines.krea2()
    text = dummy_pipelines.krea2_text(batch=2)

    def draw():
        return pipe(
            **text,
            height=13 * 16,
            width=7 * 16,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    check_pipeline(pipe, [GRID], draw)


def test_a_training_call_is_that_of_the_pipeline(transformer):
    """Latents are packed and positions numbered as the pipeline does; the timestep is sigma."""
    pipe, latents = dummy_pipelines.krea2(), torch.randn(2, 4, 10, 6)
    text = {"text": torch.randn(2, 9, 3, 12), "mask": torch.ones(2, 9)}
    call = training_adapter_for(transformer).training_call(latents, torch.tensor([0.3, 0.8]), text, None)
    assert torch.equal(call["hidden_states"], pipe._pack_latents(latents, 2, 4, 10, 6))
    assert torch.equal(call["position_ids"], pipe.prepare_position_ids(9, 5, 3, "cpu"))
    assert call["encoder_attention_mask"].dtype == torch.bool
    assert torch.equal(call["timestep"], torch.tensor([0.3, 0.8]))
    assert call.keys() <= inspect.signature(krea2.Krea2Transformer2DModel.forward).parameters.keys()


def test_distilled_weights_have_no_gate(trained, transformer):
    before = snapshot(transformer)["state"]
    changed = {name for name, x in trained.state_dict().items() if name in before and not torch.equal(x, before[name])}
    names = ("to_q", "to_k", "to_v", "to_out.0")
    assert changed == {f"transformer_blocks.{i}.attn.{name}.weight" for i in range(3) for name in names}


def test_errors_for_unsupported_features(transformer):
    with pytest.raises(ValueError, match="finds none for this model, a Krea2Transformer2DModel; give weights=None"):
        clear.linearize(transformer, 8)
