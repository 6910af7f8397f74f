"""NTK scaling and proportional attention."""

import contextlib
import inspect
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_1d_rotary_pos_embed

import clear_attn as clear
from clear_attn.methods import Clear
from clear_attn.methods.method import proportional_scale
from clear_attn.models import adapter_for
from tests.helpers import dummy_models
from tests.helpers.families import FAMILIES, each_family
from tests.helpers.reference_model import FLUX_ATTENTION, SD3_ATTENTION, run
from tests.helpers.snapshots import assert_same, snapshot

GRID = (9, 12)


def with_scale(transformer, call, scale):
    """Return the output of the original model with all scores scaled by `scale` * head_dim^-0.5."""
    text_first = isinstance(transformer, type(dummy_models.flux_transformer()))
    name, plain = (
        (FLUX_ATTENTION[0], dispatch_attention_fn) if text_first else (SD3_ATTENTION[0], F.scaled_dot_product_attention)
    )

    def scaled(query, *args, **kwargs):
        return plain(query, *args, **{**kwargs, "scale": scale * query.shape[-1] ** -0.5})

    with mock.patch(name, scaled):
        return run(transformer, call)


class TestNtkScaling:
    def test_equals_the_rotary_embedding_of_a_larger_theta(self):
        transformer = dummy_models.flux_transformer()
        ids = dummy_models.image_ids(GRID)
        with clear.ntk_scaling(transformer, 10):
            cos, _ = transformer.pos_embed(ids)
        expected = [
            get_1d_rotary_pos_embed(
                size, ids[:, axis], theta=100_000, repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64
            )[0]
            for axis, size in enumerate(dummy_models.FLUX_CONFIG["axes_dims_rope"])
        ]
        assert torch.equal(cos, torch.cat(expected, dim=-1))

    @each_family()
    @pytest.mark.parametrize("linearized", [False, True])
    def test_equals_an_embedding_that_was_made_with_a_larger_theta(self, family, linearized):
        transformer, other = family.transformer(), family.transformer()
        embedding = adapter_for(transformer).rotary_embedding(transformer)
        if embedding is None:
            with pytest.raises(ValueError, match="ntk_factor=10 needs a rotary embedding"):
                clear.ntk_scaling(transformer, 10).__enter__()
            return
        parts = {**dict(transformer.named_modules()), **vars(transformer)}  # Z-Image's is no module
        name = next(name for name, part in parts.items() if part is embedding)
        settings = {name: getattr(embedding, name) for name in inspect.signature(type(embedding)).parameters}
        setattr(other, name, type(embedding)(**{**settings, "theta": 10 * embedding.theta}))
        if linearized:
            clear.linearize(transformer, 4, weights=None)
            clear.linearize(other, 4, weights=None)
        call = family.call(transformer, GRID)
        plain, expected = run(transformer, call), run(other, call)
        assert (plain - expected).abs().max() > 1e-4
        for _ in range(2):
            with clear.ntk_scaling(transformer, 2), clear.ntk_scaling(transformer, 5):
                torch.testing.assert_close(run(transformer, call), expected, atol=1e-6, rtol=0)
            assert torch.equal(run(transformer, call), plain)

    @pytest.mark.parametrize("called", [False, True])
    def test_z_images_table_is_made_again_and_put_back(self, called):
        family = FAMILIES.get("z_image") or pytest.skip("diffusers is too old for Z-Image")
        transformer = family.transformer()
        embedding = transformer.rope_embedder
        if called:
            run(transformer, family.call(transformer, GRID))
        table = embedding.freqs_cis
        assert (table is not None) == called
        ids = torch.tensor([[0, 0, 0], [3, 1, 7], [40, 11, 2]])
        for factor in (2, 20):
            fails = pytest.raises(ZeroDivisionError) if factor == 20 else contextlib.nullcontext()
            with fails, clear.ntk_scaling(transformer, factor):
                angles = [
                    ids[:, axis, None] * (256 * factor) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                    for axis, dim in enumerate(dummy_models.Z_IMAGE_CONFIG["axes_dims"])
                ]
                expected = torch.polar(torch.ones(()).double(), torch.cat(angles, dim=1)).to(torch.complex64)
                torch.testing.assert_close(embedding(ids), expected)
                if factor == 20:
                    raise ZeroDivisionError
            assert embedding.theta == 256
            assert embedding.freqs_cis is table

    def test_restores_everything_also_after_an_error(self, pipe):
        before = snapshot(pipe.transformer), pipe.transformer.pos_embed.theta
        with clear.ntk_scaling(pipe, 10) as given:
            assert given is pipe
            with clear.ntk_scaling(pipe.transformer, 3):
                assert pipe.transformer.pos_embed.theta == 30 * before[1]
            assert pipe.transformer.pos_embed.theta == 10 * before[1]
        with pytest.raises(ZeroDivisionError), clear.ntk_scaling(pipe, 10):
            raise ZeroDivisionError
        assert pipe.transformer.pos_embed.theta == before[1]
        assert_same(pipe.transformer, before[0])

    @pytest.mark.parametrize("factor", [0, -1, math.inf, math.nan, "ten", True])
    def test_refuses_invalid_factors(self, factor):
        with pytest.raises(ValueError, match="ntk_factor must be a finite number above 0"):
            clear.ntk_scaling(dummy_models.flux_transformer(), factor).__enter__()

    def test_refuses_a_model_without_rotary_embedding(self):
        with pytest.raises(ValueError, match="ntk_factor=10 needs a rotary embedding, and a SD3Transformer2DModel has"):
            clear.ntk_scaling(dummy_models.sd3_transformer(), 10).__enter__()


class TestProportionalAttention:
    def test_scale_multiplier(self):
        assert proportional_scale(64 * 64 + 512) == 1
        assert math.isclose(Clear(16).scale_multiplier(66048), math.sqrt(math.log(66048, 4608)))
        assert math.isclose(Clear(16, 4).scale_multiplier(66048), math.sqrt(math.log(660480, 4608)))

    @pytest.mark.parametrize("window", [None, 40])
    def test_scales_every_score(self, family, transformer, window):
        call = family.call(transformer, GRID)
        expected = with_scale(transformer, call, proportional_scale(GRID[0] * GRID[1] + 7))
        plain = run(transformer, call)
        local = clear.linearized(transformer, window, weights=None) if window else contextlib.nullcontext()
        with local, clear.proportional_attention(transformer) as given:
            assert given is transformer
            torch.testing.assert_close(run(transformer, call), expected)
        assert (plain - expected).abs().max() > 1e-3
        assert torch.equal(run(transformer, call), plain)

    def test_pooled_keys_count_as_published(self, family, transformer):
        clear.linearize(transformer, 4, 3, weights=None)
        seen = []

        def attention(*args, scale, **kwargs):
            seen.append(scale)
            return clear.clear_attention(*args, scale=scale, **kwargs)

        with (
            mock.patch("clear_attn.methods.clear.clear_attention", attention),
            clear.proportional_attention(transformer),
        ):
            run(transformer, family.call(transformer, GRID))
        assert seen == pytest.approx([math.sqrt(math.log(10 * (108 + 7), 4608) / 16)] * family.layers)

    @pytest.mark.parametrize("window", [None, 4])
    def test_restores_everything_also_after_an_error(self, family, transformer, window):
        if window:
            clear.linearize(transformer, window, weights=None)
        before = snapshot(transformer)
        with pytest.raises(ZeroDivisionError), clear.proportional_attention(transformer):
            raise ZeroDivisionError
        assert_same(transformer, before)

    def test_fused_projections(self, pipe):
        call = dummy_models.flux_call(pipe.transformer, GRID)
        expected = with_scale(pipe.transformer, call, proportional_scale(115))
        pipe.transformer.fuse_qkv_projections()
        with clear.proportional_attention(pipe):
            torch.testing.assert_close(run(pipe.transformer, call), expected, atol=1e-4, rtol=1e-4)

    def test_the_callers_keywords_are_unchanged(self, transformer, family):
        call = {**family.call(transformer, GRID), "joint_attention_kwargs": {"scale": 1.0}}
        expected = with_scale(transformer, call, proportional_scale(115))
        with clear.proportional_attention(transformer):
            torch.testing.assert_close(run(transformer, call), expected)
        assert call["joint_attention_kwargs"] == {"scale": 1.0}

    def test_refuses_other_processors(self, transformer, family):
        class Foreign(torch.nn.Module):
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, image_rotary_emb=None):
                return hidden_states

        layer = next(iter(family_layers(transformer)))
        with clear.proportional_attention(transformer):
            original = layer.processor
            layer.set_processor(Foreign())
            with pytest.raises(RuntimeError, match="has a Foreign, whose scores proportional attention cannot scale"):
                run(transformer, family.call(transformer, GRID))
            layer.set_processor(original)
        layer.set_processor(Foreign())
        with pytest.raises(RuntimeError, match="has a Foreign"):
            clear.proportional_attention(transformer).__enter__()

    def test_refuses_subclasses_of_the_original_processors(self, transformer):
        layer = family_layers(transformer)[1]
        own = type("Own", (type(layer.processor),), {})()
        layer.set_processor(own)
        with pytest.raises(RuntimeError, match="has a Own, whose scores proportional attention cannot scale"):
            clear.proportional_attention(transformer).__enter__()
        assert layer.processor is own

    @pytest.mark.parametrize("name", [name for name in ("krea2", "flux3") if name in FAMILIES])
    def test_scales_linearized_layers_alone(self, name):
        """Their own processors take no scale."""
        transformer = FAMILIES[name].transformer()
        call = FAMILIES[name].call(transformer, (9, 12))
        refused = pytest.raises(RuntimeError, match=r"has a (Krea2|Flux3)AttnProcessor")
        with refused, clear.proportional_attention(transformer):
            pass
        clear.linearize(transformer, 4, weights=None)
        local = run(transformer, call)
        with clear.proportional_attention(transformer):
            assert (run(transformer, call) - local).abs().max() > 1e-4
        assert torch.equal(run(transformer, call), local)

    def test_refuses_a_controlnet(self):
        net = FluxControlNetModel(**dummy_models.FLUX_CONFIG)
        with pytest.raises(RuntimeError, match="cannot scale while it is dense"):
            clear.proportional_attention(net).__enter__()


def family_layers(transformer):
    return [transformer.get_submodule(name.removesuffix(".processor")) for name in transformer.attn_processors]
