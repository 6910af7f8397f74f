"""What is special to FLUX.2: ids of four axes, layers with one projection for everything."""

import diffusers
import pytest
import torch
from PIL import Image

import clear_attn as clear
from clear_attn.models.flux2 import ParallelProcessor
from tests.helpers import dummy_models, dummy_pipelines, families, hardware
from tests.helpers.reference_model import check_pipeline, in_raster_order, run
from tests.helpers.snapshots import snapshot


@pytest.fixture
def family():
    return families.FLUX2


@pytest.mark.parametrize("backend", hardware.BACKENDS)
def test_three_images_of_different_size(transformer, backend):
    grids = [(13, 7), (9, 9), (4, 6)]
    call = dummy_models.flux2_call(transformer, *grids, batch=2)
    expected = run(in_raster_order(transformer, grids, clear.methods.Clear(4, 2)), call)
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


@pytest.fixture
def pipe():
    if not hasattr(diffusers, "Flux2KleinPipeline"):
        pytest.skip("Flux2KleinPipeline came with diffusers 0.37")
    return dummy_pipelines.flux2()


@pytest.mark.parametrize("references", [[], [(64, 80)], [(72, 64), (64, 64)]])
def test_pipeline_with_guidance_and_reference_images(pipe, references):
    rng = torch.Generator().manual_seed(4)
    noise = torch.rand(100, 100, 3, generator=rng).mul(255).byte().numpy()
    images = [Image.fromarray(noise).resize((width, height)) for height, width in references]

    def draw():
        return pipe(
            image=images or None,
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
    with pytest.raises(ValueError, match=r"kv_cache_mode='extract' caches the keys .* use Flux2KleinPipeline"):
        run(transformer, {**call, "kv_cache_mode": "extract", "num_ref_tokens": 4})


def test_distilled_weights_have_the_projections_of_single_blocks(trained, transformer):
    assert isinstance(trained.single_transformer_blocks[0].attn.processor, ParallelProcessor)
    before = snapshot(transformer)["state"]
    changed = {name for name, x in trained.state_dict().items() if name in before and not torch.equal(x, before[name])}
    assert {f"single_transformer_blocks.1.attn.{name}.weight" for name in ("to_qkv_mlp_proj", "to_out")} <= changed


def test_unsupported_features(pipe):
    with pytest.raises(
        ValueError, match="finds none for this model, a Flux2Transformer2DModel in a Flux2KleinPipeline; give"
    ):
        clear.linearize(pipe, 8)


def test_ntk_scaling_and_proportional_attention(transformer):
    call = dummy_models.flux2_call(transformer, (9, 12))
    original = run(transformer, call)
    with clear.ntk_scaling(transformer, 10):
        assert (run(transformer, call) - original).abs().max() > 1e-4
    refused = pytest.raises(RuntimeError, match=r"has a Flux2AttnProcessor|has a Flux2ParallelSelfAttnProcessor")
    with refused, clear.proportional_attention(transformer):
        pass
    clear.linearize(transformer, 4, weights=None)
    local = run(transformer, call)
    with clear.proportional_attention(transformer):
        assert (run(transformer, call) - local).abs().max() > 1e-4
    torch.testing.assert_close(run(transformer, call), local, atol=0, rtol=0)


def test_ids_of_a_further_axis_must_agree_in_an_image(transformer):
    call = dummy_models.flux2_call(transformer, (4, 6))
    call["img_ids"] = call["img_ids"].clone()
    call["img_ids"][:, 5, 3] = 1
    clear.linearize(transformer, 3, weights=None)
    with pytest.raises(ValueError, match="img_ids must number the tokens of each image row by row"):
        run(transformer, call)
