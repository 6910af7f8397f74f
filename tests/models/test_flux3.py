"""What is particular to FLUX.3: layers of one kind of tokens, references as an input of their own, half steps."""

import inspect

import pytest
import torch

import clear_attn as clear
from clear_attn.models import adapter_for, training_adapter_for
from clear_attn.models.context.context import ClearContext
from clear_attn.patching.target import entry_hook_of
from tests.helpers import dummy_models, dummy_pipelines, families, hardware
from tests.helpers.reference_model import in_raster_order, run
from tests.helpers.snapshots import snapshot

flux3 = pytest.importorskip("diffusers.models.transformers.transformer_flux3")
GRIDS = [(13, 7), (9, 9), (4, 6)]


@pytest.fixture
def family():
    return families.FLUX3


@pytest.mark.parametrize("backend", hardware.BACKENDS)
@pytest.mark.parametrize("flow_map", [False, True])
def test_references_of_different_size(backend, flow_map):
    transformer = dummy_models.flux3_transformer(flow_map=flow_map)
    call = dummy_models.flux3_call(transformer, *GRIDS, batch=2)
    expected = run(in_raster_order(transformer, GRIDS, clear.methods.Clear(4, 2)), call)
    original = run(transformer, call)
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)
    assert (expected - original).abs().max() > 1e-3


def test_a_reference_changes_the_image(transformer):
    call = dummy_models.flux3_call(transformer, *GRIDS)
    clear.linearize(transformer, 4, weights=None)
    output = run(transformer, call)
    other = {**call, "image_cond_hidden_states": call["image_cond_hidden_states"] + 1}
    assert (run(transformer, other) - output).abs().max() > 1e-3
    without = run(transformer, {**call, "image_cond_hidden_states": None, "image_cond_ids": None})
    assert (without - output).abs().max() > 1e-3


def test_layers_of_the_text_keep_their_own_attention(transformer):
    clear.linearize(transformer, 3, 2, weights=None)
    processors = transformer.attn_processors.items()
    kinds = {name.split(".")[0]: type(processor).__name__ for name, processor in processors}
    ours = dict.fromkeys(("mode_blocks", "single_transformer_blocks"), "Flux3Processor")
    assert kinds == {"txt_mode_blocks": "Flux3AttnProcessor", **ours}


def test_layers_of_one_kind_share_a_plan(transformer, monkeypatch):
    """One plan for the image, one for the references if there are any, one for all tokens."""
    clear.linearize(transformer, 3, weights=None)
    groups = entry_hook_of(transformer).groups
    names = ["mode_blocks.image.{}.attn", "mode_blocks.image_cond.{}.attn", "single_transformer_blocks.{}.attn"]
    assert len(set(groups.values())) == 3
    made, create = [], ClearContext.__init__

    def record(self, made_groups, *args, **kwargs):
        made.append(made_groups)
        create(self, made_groups, *args, **kwargs)

    monkeypatch.setattr(ClearContext, "__init__", record)
    for references, tokens in ((GRIDS[1:], [91, 105, 203]), ([], [91, None, 98])):
        run(transformer, dummy_models.flux3_call(transformer, GRIDS[0], *references))
        plans = [made[-1][groups[name.format(layer)]].plan for name in names for layer in range(2)]
        assert [plan and plan.tokens for plan in plans] == [number for number in tokens for _ in range(2)]


def test_ids_in_bfloat16_are_reconstructed(transformer):
    """Half steps past 128 are the same number in bfloat16."""
    call = dummy_models.flux3_call(transformer, (2, 300), (300, 2))
    clear.linearize(transformer, 5, weights=None)
    expected = run(transformer, call)
    coarse = {name: x.bfloat16() if name in ("img_ids", "image_cond_ids") else x for name, x in call.items()}
    assert coarse["img_ids"][:, 2].unique().numel() < 300
    assert torch.equal(run(transformer, coarse), expected)


def test_calls_that_do_not_fit(transformer):
    call = dummy_models.flux3_call(transformer, (4, 6), (3, 5))
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(ValueError, match="img_ids has 20 tokens, hidden_states has 24"):
        run(transformer, {**call, "img_ids": dummy_models.flux3_call(transformer, (4, 5))["img_ids"]})
    with pytest.raises(ValueError, match="image_cond_ids has 24 tokens, image_cond_hidden_states has 15"):
        run(transformer, {**call, "image_cond_ids": call["img_ids"]})
    twice = {name: torch.cat([call[name], call[name]], dim=-2) for name in ("img_ids", "hidden_states")}
    with pytest.raises(ValueError, match=r"img_ids must number one image, got images of \(\(4, 6\), \(4, 6\)\)"):
        run(transformer, {**call, **twice})
    with pytest.raises(ValueError, match="`image_cond_hidden_states` requires `image_cond_ids`"):
        run(transformer, {**call, "image_cond_ids": None})
    with pytest.raises(ValueError, match="`image_cond_ids` was passed without `image_cond_hidden_states`"):
        run(transformer, {**call, "image_cond_hidden_states": None})


def test_a_schedule(transformer):
    """It also names the layers of the image or of the references alone."""
    call = dummy_models.flux3_call(transformer, *GRIDS)
    windows = {"mode_blocks.image": 6, "mode_blocks.image_cond.1": 5, "single_transformer_blocks": 3}
    expected = in_raster_order(transformer, GRIDS, clear.methods.Clear(3))
    for name, window in windows.items():
        for layer, attn in adapter_for(expected).attention_layers(expected).items():
            if f"{layer}.".startswith(f"{name}."):
                grids, _, weight = attn.processor.rule
                attn.processor.rule = grids, clear.methods.Clear(window), weight
    schedule = clear.Schedule(windows=windows, dense_above_sigma=0.8)
    clear.linearize(transformer, 3, weights=None, schedule=schedule)
    torch.testing.assert_close(run(transformer, call), run(expected, call), atol=1e-5, rtol=0)
    local = run(transformer, {**call, "timestep": torch.tensor([0.9])})
    clear.restore(transformer)
    torch.testing.assert_close(run(transformer, {**call, "timestep": torch.tensor([0.9])}), local, atol=1e-5, rtol=0)


def test_a_training_call_is_that_of_the_pipeline(transformer):
    """Latents are packed and ids are made as the pipeline does; the timestep is sigma."""
    from diffusers.modular_pipelines.flux3 import before_denoise, encoders

    latents, text = torch.randn(2, 2, 10, 6), {"text": torch.randn(2, 9, 12)}
    call = training_adapter_for(transformer).training_call(latents, torch.tensor([0.3, 0.8]), text, None)
    patches = encoders.Flux3VaeEncoderStep._patchify_latents(latents)
    assert torch.equal(call["hidden_states"], patches.flatten(2).transpose(1, 2))
    assert torch.equal(call["img_ids"], before_denoise._prepare_image_ids(5, 3, 0.5))
    assert torch.equal(call["txt_ids"], before_denoise.Flux3TextRoPEInputsStep._prepare_text_ids(text["text"]))
    assert torch.equal(call["timestep"], torch.tensor([0.3, 0.8]))
    assert call.keys() <= inspect.signature(flux3.Flux3Transformer2DModel.forward).parameters.keys()


def test_prompts_are_encoded_by_the_pipelines_own_block(transformer, monkeypatch):
    from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

    asked = []

    def encode(text_encoder, tokenizer, prompt, device, max_sequence_length, pad_multiple, hidden_states_layers):
        asked.append((prompt, max_sequence_length, pad_multiple))
        return torch.full((1, max_sequence_length, 3), float(len(prompt)))

    monkeypatch.setattr(Flux3TextEncoderStep, "_get_qwen3_vl_prompt_embeds", staticmethod(encode))
    parts = type("Parts", (), {"text_encoder": dummy_pipelines.unused_text_encoder(), "tokenizer": torch.nn.Identity()})
    text = training_adapter_for(transformer).encode_prompts(parts, ["a cat", "a circle"], 4)
    assert asked == [("a cat", 4, 4), ("a circle", 4, 4)]
    assert torch.equal(text["text"][:, 0, 0], torch.tensor([5.0, 8.0]))


def test_a_flow_map_is_not_distilled():
    with pytest.raises(TypeError, match=r"is a flow map, .* cannot be distilled"):
        training_adapter_for(dummy_models.flux3_transformer(flow_map=True))


def test_layers_of_references_keep_the_teachers_weights(trained, transformer):
    """Distilled weights have all layers; those of references alone are not trained without references."""
    before = snapshot(transformer)["state"]
    changed = {name for name, x in trained.state_dict().items() if name in before and not torch.equal(x, before[name])}
    layers = adapter_for(trained).attention_layers(trained)
    assert changed == {f"{layer}.{name}.weight" for layer in layers for name in ("to_q", "to_k", "to_v", "to_out.0")}


def test_the_cost_does_not_count_layers_of_references(transformer):
    counted = clear.cost(transformer, 128, 96, window=3, text_tokens=7)
    assert (counted.layers, counted.layers_without_text) == (4, 2)


def test_errors_for_unsupported_features(transformer):
    with pytest.raises(ValueError, match="finds none for this model, a Flux3Transformer2DModel; give weights=None"):
        clear.linearize(transformer, 8)
    clear.linearize(transformer, method=clear.methods.Swin(4), weights=None)
    with pytest.raises(ValueError, match="attends in one image, and this call has 2"):
        run(transformer, dummy_models.flux3_call(transformer, *GRIDS))
