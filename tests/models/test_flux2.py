"""FLUX.2: what all families do, and what it has of its own: ids of four axes, layers that project all in one."""
# ruff: noqa: F401, F811  imported tests and fixtures

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clear_attn as clear
from clear_attn.models import training_adapter_for
from clear_attn.models.flux2 import ParallelProcessor
from tests.helpers import dummy_models, dummy_pipelines, hardware
from tests.helpers.reference_model import check_compiled_blocks, check_pipeline, in_raster_order, run
from tests.helpers.snapshots import assert_same, snapshot

# What holds of every family, here of this one.
from tests.models.test_families import (
    check_rule,
    test_a_deep_copy_is_independent,
    test_a_window_that_covers_the_grid_is_the_stock_model,
    test_another_default_device,
    test_fused_projections,
    test_gradients_under_checkpointing_with_two_sizes_in_flight,
    test_portrait_and_landscape_in_turn,
    test_positional_arguments_and_dataclass_output,
    test_the_callers_keywords_are_left_alone,
)
from tests.patching.test_linearization import (
    TestLora,
    checkpoint,
    test_hooks_of_others_see_raster_order,
    test_restore_puts_back_replaced_weights,
)
from tests.patching.test_saving import folder, test_there_and_back, trained
from tests.profiling.test_memory import WIDE, peak


@pytest.fixture
def family():
    return dummy_models.FLUX2


@given(data=st.data())
@settings(max_examples=10)
def test_equals_the_rule_in_raster_order(data):
    check_rule(dummy_models.FLUX2, data, ["tiled", "reference"])


@pytest.mark.parametrize("backend", hardware.BACKENDS)
def test_three_pictures_of_different_size(transformer, backend):
    grids = [(13, 7), (9, 9), (4, 6)]
    call = dummy_models.flux2_call(transformer, *grids, batch=2)
    expected = run(in_raster_order(transformer, grids, clear.methods.Clear(4, 2)), call)
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


@pytest.fixture
def pipe():
    return dummy_pipelines.flux2()


@pytest.mark.parametrize("references", [[], [(64, 80)], [(72, 64), (64, 64)]])
def test_pipeline_with_guidance_and_reference_pictures(pipe, references):
    rng = torch.Generator().manual_seed(4)
    noise = torch.rand(100, 100, 3, generator=rng).mul(255).byte().numpy()
    pictures = [Image.fromarray(noise).resize((width, height)) for height, width in references]

    def draw():
        return pipe(
            image=pictures or None,
            **dummy_pipelines.flux2_text(),
            height=60,
            width=44,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    check_pipeline(pipe, [(15, 11), *((height // 4, width // 4) for height, width in references)], draw)


def test_kept_keys_of_references_are_refused():
    transformer = clear.linearize(dummy_models.flux2_transformer(), 3, weights=None)
    call = dummy_models.flux2_call(transformer, (4, 6))
    with pytest.raises(ValueError, match=r"kv_cache_mode='extract' keeps the keys .* use Flux2KleinPipeline"):
        run(transformer, {**call, "kv_cache_mode": "extract", "num_ref_tokens": 4})


def test_distilled_weights_hold_what_single_blocks_project(trained, transformer):
    assert isinstance(trained.single_transformer_blocks[0].attn.processor, ParallelProcessor)
    before = snapshot(transformer)["state"]
    changed = {name for name, x in trained.state_dict().items() if name in before and not torch.equal(x, before[name])}
    assert {f"single_transformer_blocks.1.attn.{name}.weight" for name in ("to_qkv_mlp_proj", "to_out")} <= changed


def test_what_it_is_refused_for(pipe):
    with pytest.raises(TypeError, match="a Flux2Transformer2DModel cannot be distilled"):
        training_adapter_for(pipe.transformer)
    with pytest.raises(TypeError, match="highres does not know a Flux2KleinPipeline"):
        clear.highres(pipe, "a red circle", height=64, width=64)
    with pytest.raises(ValueError, match="this is a Flux2Transformer2DModel; give weights=None"):
        clear.linearize(pipe, 8)


def test_theta_is_scaled_and_scores_are_sharpened(transformer):
    call = dummy_models.flux2_call(transformer, (9, 12))
    stock = run(transformer, call)
    with clear.ntk_scaling(transformer, 10):
        assert (run(transformer, call) - stock).abs().max() > 1e-4
    refused = pytest.raises(RuntimeError, match=r"has a Flux2AttnProcessor|has a Flux2ParallelSelfAttnProcessor")
    with refused, clear.proportional_attention(transformer):
        pass
    clear.linearize(transformer, 4, weights=None)
    local = run(transformer, call)
    with clear.proportional_attention(transformer):
        assert (run(transformer, call) - local).abs().max() > 1e-4
    torch.testing.assert_close(run(transformer, call), local, atol=0, rtol=0)


def test_compiled_blocks(transformer):
    check_compiled_blocks(transformer, dummy_models.flux2_call(transformer, (13, 7), (4, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 8])
def test_activations_lie_between_the_bounds(window, dtype):
    transformer, grid = dummy_models.flux2_transformer(**WIDE, axes_dims_rope=(8, 8, 8, 8)).to(dtype), (24, 32)
    call = dummy_models.flux2_call(transformer, grid, text=32)
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        call[name] = call[name].to(dtype)
    if window:
        clear.linearize(transformer, window, weights=None)
    bounds = clear.cost(transformer, 16 * grid[0], 16 * grid[1], text_tokens=32).memory.activations
    seen = peak(lambda: transformer(**call))
    assert bounds.least < seen < bounds.likely, 24 * seen / bounds.likely


def test_cost(transformer):
    counted = clear.cost(transformer, 128, 96, window=3)
    assert (counted.height, counted.width, counted.layers, counted.text_tokens) == (8, 6, 4, 512)
    assert counted.heads * counted.head_dim == 32


def test_ids_of_a_further_axis_must_agree_in_a_picture(transformer):
    call = dummy_models.flux2_call(transformer, (4, 6))
    call["img_ids"] = call["img_ids"].clone()
    call["img_ids"][:, 5, 3] = 1
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(ValueError, match="img_ids must number the tokens of each picture row by row"):
        run(transformer, call)
