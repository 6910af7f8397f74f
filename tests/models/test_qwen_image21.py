"""What is particular to Qwen-Image 2.1: text that never attends to the image, cached keys, condition images."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import clear_attn as clear
from clear_attn.distill.data import buckets
from clear_attn.models.qwen_image21 import HIDDEN, Qwen21Training
from clear_attn.patching.target import find_target
from tests.helpers import dummy_models, dummy_pipelines, families, hardware
from tests.helpers.reference_attention import window_mask
from tests.helpers.reference_model import check_pipeline, in_raster_order, joined, run
from tests.matrix.rows import ROWS

qwen21 = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
GRID, CONDITIONS = (13, 8), ((3, 4), (5, 8))
BATCH = {"batch": 2, "padded": (0, 3)}
TARGET = math.prod(GRID)


@pytest.fixture
def family():
    return families.QWEN21


def call_with_conditions(transformer, **options):
    return dummy_models.qwen21_call(transformer, GRID, *CONDITIONS, **BATCH, **options)


def test_equals_the_rule_written_as_one_mask(transformer):
    """The prefix is causal, condition images attend to themselves, the target's window is a disc."""
    call = call_with_conditions(transformer)

    class Ruled(qwen21.QwenImage21AttnProcessor):
        def __call__(self, attn, hidden_states, attention_mask=None, rotary_emb=None, key_valid=None, **kwargs):
            query, key, value, _ = qwen21._qwenimage21_prepare_qkv(attn, hidden_states, rotary_emb, None, None, None)
            slots = call["img_mask"][0].repeat_interleave(torch.where(call["img_mask"][0], 4, 1))
            ids, _ = transformer.build_token_metadata(slots, call["img_shapes"][0])
            allowed = torch.ones(len(ids), len(ids)).tril().bool() | ((ids[:, None] == ids) & (ids >= 0))
            allowed[-TARGET:, -TARGET:] = window_mask([GRID], 4)
            qkv = (x.transpose(1, 2) for x in (query, key, value))
            output = scaled_dot_product_attention(*qkv, attn_mask=allowed & key_valid[:, None, None])
            return attn.to_out[0](output.transpose(1, 2).flatten(2))

    originals = [block.attn.processor for block in transformer.transformer_blocks]
    for block in transformer.transformer_blocks:
        block.attn.set_processor(Ruled())
    expected = run(transformer, call)
    for block, original in zip(transformer.transformer_blocks, originals, strict=True):
        block.attn.set_processor(original)
    dense = run(transformer, call)
    clear.linearize(transformer, 4, weights=None)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)
    start = expected.shape[1] - TARGET
    torch.testing.assert_close(expected[:, :start], dense[:, :start], atol=1e-5, rtol=0)
    assert (expected - dense)[:, start:].abs().max() > 1e-2


@pytest.mark.parametrize("backend", hardware.BACKENDS)
@pytest.mark.parametrize("processor", ["QwenImage21AttnProcessor", "QwenImage21FlexAttnProcessor"])
def test_condition_images_and_padding(transformer, processor, backend):
    call = call_with_conditions(transformer)
    original = run(transformer, call)
    expected = run(in_raster_order(transformer, [GRID], clear.methods.Clear(4, 2)), call)
    transformer.set_attn_processor(getattr(qwen21, processor)())
    clear.linearize(transformer, 40, weights=None, backend=backend)
    torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    output = run(transformer, call)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert (expected - original).abs().max() > 1e-2
    hidden = call["encoder_hidden_states"].clone()
    hidden[1, -3:] = 50
    changed = run(transformer, {**call, "encoder_hidden_states": hidden})
    torch.testing.assert_close(changed[:, -TARGET:], output[:, -TARGET:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [clear.methods.Clear(4, 2), clear.methods.Swin(4), clear.methods.Agent(3)], ids=repr)
def test_cached_keys(transformer, method):
    """The keys before the image are those of the original model, so steps of both can share a cache."""
    call = call_with_conditions(transformer)

    def step(mode, cache):
        return run(transformer, {**call, "kv_cache": cache, "kv_cache_mode": mode})

    of_original, of_linearized = (qwen21.QwenImage21KVCache(3) for _ in range(2))
    dense = step("extract", of_original)
    clear.linearize(transformer, method=method, weights=None)
    whole = run(transformer, call)
    torch.testing.assert_close(step("extract", of_linearized), whole, atol=1e-5, rtol=0)
    for cache in (of_linearized, of_original):
        torch.testing.assert_close(step("cached", cache), whole[:, -TARGET:], atol=1e-5, rtol=0)
    caches = zip(of_original.layer_caches, of_linearized.layer_caches, strict=True)
    for parts in (zip(ours.get(), theirs.get(), strict=True) for ours, theirs in caches):
        for ours, theirs in parts:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    clear.restore(transformer)
    torch.testing.assert_close(step("cached", of_linearized), dense[:, -TARGET:], atol=1e-5, rtol=0)


def test_cached_keys_in_compiled_blocks(transformer):
    call = call_with_conditions(transformer)
    clear.linearize(transformer, 4, 2, weights=None)
    expected = run(transformer, call)
    torch.compiler.reset()
    dummy_models.compile_blocks(transformer, backend="aot_eager")
    cache = qwen21.QwenImage21KVCache(3)
    for mode in ("extract", "cached", "cached"):
        output = run(transformer, {**call, "kv_cache": cache, "kv_cache_mode": mode})
        torch.testing.assert_close(output, expected[:, -output.shape[1] :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if row.family == "Qwen-Image 2.1"])
def test_pipelines(row):
    """With guidance by a text of another length, without a cache, and with condition images."""
    row = ROWS[row]
    pipe = row.pipeline()
    check_pipeline(pipe, row.grids, lambda: row.draw(pipe))


def test_a_schedule_of_steps_in_one_cache(transformer):
    """The first step is dense, and the keys that it caches serve the steps with a window."""
    row = ROWS["Qwen-Image 2.1 text-to-image"]
    pipe = row.pipeline()
    clear.linearize(pipe, 3, weights=None, schedule=clear.Schedule(dense_above_sigma=0.9))
    drawn, uncached = row.draw(pipe), row.draw(pipe, use_kv_cache=False)
    torch.testing.assert_close(drawn, uncached, atol=1e-5 * drawn.abs().max().item(), rtol=0)
    with clear.linearized(pipe, 3, weights=None):
        assert (row.draw(pipe) - drawn).abs().max() > 1e-3


def test_gradients_of_text_and_condition_images(transformer):
    call = call_with_conditions(transformer)
    inputs = [call[name].requires_grad_() for name in ("hidden_states", "encoder_hidden_states")]
    reference = in_raster_order(transformer, [GRID], clear.methods.Clear(4))
    expected = torch.autograd.grad(joined(reference(**call)).square().mean(), inputs)
    clear.linearize(transformer, 4, weights=None)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    found = torch.autograd.grad(joined(transformer(**call)).square().mean(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


def test_reads_no_values_of_masks_on_an_accelerator(transformer):
    """Reading waits for it in every call. Tensors on meta have no values, so that reading one is an error."""
    call = call_with_conditions(transformer)
    adapter = find_target(transformer).adapter
    expected, _ = adapter.text_bias(call)
    assert set(expected.unique().tolist()) == {0.0, HIDDEN}
    repeats = torch.where(call["img_mask"][0, : call["encoder_hidden_states"].shape[1]], 4, 1)
    hidden = call["encoder_hidden_states_mask"].bool() | call["img_mask"][:, : len(repeats)]
    assert torch.equal(expected, torch.where(hidden, 0.0, HIDDEN).repeat_interleave(repeats, dim=1))
    on_meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    adapter.parse_call(transformer, on_meta)
    bias, _ = adapter.text_bias(on_meta)
    assert (bias.shape, bias.device.type) == (expected.shape, "meta")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_shapes": None}, "img_shapes must give the frames, rows and columns"),
        ({"img_shapes": [[(1, 13, 7)]]}, r"4 tokens for each slot of img_mask, got \(1, 13, 7\); .* of 32 pixels"),
        ({"img_shapes": [[(2, 13, 4)]]}, r"one frame, .* got \(2, 13, 4\)"),
        ({"img_shapes": [[(1, 2052, 4)]]}, r"at most 2048 rows and columns .* got \(1, 2052, 4\)"),
        ({"img_shapes": [[(1, 12, 8)]]}, "img_shapes have 96 image tokens, hidden_states has 104"),
        ({"img_mask": torch.ones(1, 32, dtype=torch.bool)}, "a slot for each of 7 tokens .* and 26 .* got 32"),
        (
            {"encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.bool)},
            r"encoder_hidden_states_mask must be \[1, 7\], got \[1, 6\]",
        ),
        (
            {
                "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.bool),
                "img_mask": torch.tensor([[True] * 2 + [False] * 5 + [True] * 26]),
            },
            "img_mask must mark 0 slots among the tokens of encoder_hidden_states, .* got 2; pass both",
        ),
    ],
)
def test_calls_that_do_not_fit(transformer, change, words):
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(ValueError, match=words):
        run(transformer, {**dummy_models.qwen21_call(transformer, GRID), **change})


def test_cost_counts_causal_text():
    """Text attends to the text before it, and a transformer alone has tokens of 16 x 16 pixels."""
    report = clear.cost(dummy_models.qwen21_transformer(), 16 * 8, 16 * 12, window=3, text_tokens=10)
    assert (report.height, report.width) == (8, 12)
    text = 4 * 10 * 11 // 2 * 2 * 16
    image = 4 * 96 * (96 + 10) * 2 * 16
    assert report.dense_step_flops == 3 * (text + image)
    pipe = dummy_pipelines.qwen21()
    assert clear.cost(pipe, 16 * 8, 16 * 12, window=3, text_tokens=10).dense_step_flops == report.dense_step_flops


def test_cost_takes_the_sigmas_of_the_pipeline():
    pipe = dummy_pipelines.qwen21(sample_sigmas=[1.0, 0.7, 0.2])
    schedule = clear.Schedule(dense_above_sigma=0.9)
    counted = clear.cost(pipe, 128, 192, window=3, schedule=schedule, steps=3)
    assert [len(phase.sigmas) for phase in counted.run] == [1, 2]
    with pytest.raises(ValueError, match=r"steps=4 differs from the 3 sample_sigmas .* give steps=3"):
        clear.cost(pipe, 128, 192, window=3, schedule=schedule, steps=4)


class TestDistilling:
    """What only the training adapter of this model does: its images, and drawing with its pipeline."""

    pipe = staticmethod(dummy_pipelines.qwen21)
    training = Qwen21Training()

    def test_an_image_is_encoded_as_by_the_pipeline(self):
        pipe, pixels = self.pipe(), torch.rand(2, 3, 64, 96) * 2 - 1
        mean, std = self.training.encode_image(pipe, pixels)
        assert mean.shape == std.shape == (2, 4, 4, 6)
        assert self.training.pack(mean).shape == (2, 24, 4)
        opaque = torch.cat([pixels, torch.ones(2, 1, 64, 96)], dim=1)[:, :, None]
        latents = pipe.vae.encode(opaque).latent_dist.mode()[:, :, 0]
        center, scale = (
            torch.tensor(x).view(1, 4, 1, 1) for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        torch.testing.assert_close(mean, (latents - center) / scale)

    def test_guidance_is_true_guidance(self):
        pipe, prompts = self.pipe(), dummy_pipelines.qwen21_text()
        text = {name: prompts[name] for name in ("prompt_embeds", "prompt_embeds_mask")}
        arguments = {
            "height": 64,
            "width": 96,
            "num_inference_steps": 2,
            "output_type": "latent",
            "max_sequence_length": 512,
        }

        def draw(**given):
            generator = torch.Generator().manual_seed(0)
            return self.training.draw(pipe, **arguments, **text, **given, generator=generator).images

        negative = {f"negative_{name}": x[:, :3] for name, x in text.items()}
        assert torch.equal(draw(**negative), draw())
        assert not torch.allclose(draw(guidance_scale=4.0, **negative), draw(), atol=1e-4)

    def test_the_resolution_has_whole_slots(self):
        with pytest.raises(ValueError, match="resolution must be a multiple of 32 pixels, got 1040"):
            buckets.sizes(1040, self.training.pixel_step)
        assert all(side % 32 == 0 for size in buckets.sizes(256, self.training.pixel_step) for side in size)
