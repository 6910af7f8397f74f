"""Encoding and decoding in tiles: what tiles share, and that their borders do not show."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, AutoencoderKLFlux2, QwenImagePipeline
from diffusers.hooks import HookRegistry
from diffusers.models.attention_processor import Attention
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clear_attn import demo
from clear_attn.cascade import tiling
from clear_attn.cascade.tiling import HALO, run_in_tiles, scale_of, spans, tile_side, tiled_vae, weights
from clear_attn.parallel import decode as rank_decode
from clear_attn.profiling.memory import tiled_decode_bytes
from tests.helpers import dummy_pipelines

KINDS = {
    "plain": functools.partial(AutoencoderKL, mid_block_add_attention=False),
    "attention": AutoencoderKL,
    "FLUX.2": functools.partial(AutoencoderKLFlux2, mid_block_add_attention=False),
}
SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 2,
    "sample_size": 16,
}


# The side of a tile in latents, and in pixels of the small autoencoders.
SIDE = 64


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "LEAST_SIDE", 2 * SIDE)


@pytest.fixture
def tiled_decoding(example):
    return example("tiled_decoding")


@pytest.fixture(params=KINDS)
def vae(request):
    torch.manual_seed(0)
    return KINDS[request.param](**SMALL).eval()


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return KINDS["plain"](**SMALL).eval()


@given(length=st.integers(1, 700), side=st.integers(SIDE, 200), unit=st.sampled_from([1, 4, 8]))
def test_tiles_cover_an_axis_and_their_weights_add_up_to_1(length, side, unit):
    tiles = spans(length, side)
    total = torch.zeros(length * unit, dtype=torch.float64)
    for each in tiles:
        assert each.size <= side
        total[each.first * unit : each.last * unit] += weights(each, length, unit, total)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert [each.start for each in tiles] == [0, *(each.stop for each in tiles[:-1])]
    assert tiles[-1].stop == length
    for each in tiles:  # the outer half of a halo counts for nothing
        weight = weights(each, length, unit, total)
        edge = HALO // 2 * unit
        assert not each.start or not weight[:edge].any()
        assert each.stop == length or not weight[-edge:].any()


def test_an_image_of_one_tile_is_decoded_as_before(vae):
    latents, image = torch.randn(2, 2, 40, SIDE), torch.randn(1, 3, 2 * SIDE, 48)
    with torch.no_grad():
        decoded, encoded = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
        with tiled_vae(vae):
            assert torch.equal(vae.decode(latents).sample, decoded)
            assert torch.equal(vae.encode(image).latent_dist.mean, encoded)


def test_is_exact_within_the_reach_of_convolutions():
    torch.manual_seed(0)
    norms = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())]
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *norms, nn.Conv2d(4, 3, 3, padding=1))
    image = torch.randn(1, 2, 150, 70) + torch.linspace(-3, 3, 150)[:, None]
    with torch.no_grad():
        tiled, whole = run_in_tiles(module, module, image, SIDE, 1, 1), module(image)
        torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
        assert (module(image[:, :, :80])[:, :, :60] - whole[:, :, :60]).abs().max() > 0.05


@pytest.mark.parametrize(("dtype", "mean", "most"), [(torch.float32, 2e-4, 0.02), (torch.bfloat16, 0.01, 0.3)])
def test_tiles_are_close_to_the_whole(vae, dtype, mean, most):
    """But for attention, which stays in a tile, and the far reach of convolutions, whose weight is small."""
    vae = vae.to(dtype)
    for module in vae.modules():
        if isinstance(module, Attention):  # it is computed, and adds nothing
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)
    latents = torch.randn(2, 2, 66, 70, dtype=dtype) + torch.linspace(-2, 2, 70, dtype=dtype)
    image = torch.randn(2, 3, 132, 140, dtype=dtype) + torch.linspace(-2, 2, 140, dtype=dtype)
    with torch.no_grad():
        decoded, encoded = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
        with tiled_vae(vae):
            tiled, tiled_latents = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
        vae.tile_latent_min_size, vae.tile_sample_min_size = SIDE, 2 * SIDE
        vae.enable_tiling()
        theirs, their_latents = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
    for ours, other, whole in ((tiled, theirs, decoded), (tiled_latents, their_latents, encoded)):
        assert ours.shape == whole.shape
        assert ours.dtype == dtype
        assert (ours - whole).abs().mean() < (other - whole).abs().mean()
        assert (ours - whole).abs().mean() < mean
        assert (ours - whole).abs().max() < most


def test_norms_of_attention_are_shared_at_every_resolution():
    """With attention that attends to nothing, so that what is left of it are its norms."""

    class NormAlone:
        def __call__(self, attn, x, **settings):
            return x + attn.group_norm(x.flatten(2)).view_as(x)

    torch.manual_seed(0)
    blocks = {"down_block_types": ("AttnDownEncoderBlock2D",) * 2, "up_block_types": ("AttnUpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**{**SMALL, **blocks}).eval()
    for module in vae.modules():
        if isinstance(module, Attention):
            module.set_processor(NormAlone())
    latents = torch.randn(1, 2, 70, 6) + torch.linspace(-3, 3, 70)[:, None]
    image = torch.randn(1, 3, 140, 12) + torch.linspace(-3, 3, 140)[:, None]
    with torch.no_grad():
        decoded, encoded = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
        with tiled_vae(vae):
            tiled, tiled_latents = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
    torch.testing.assert_close(tiled, decoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiled_latents, encoded, atol=1e-5, rtol=0)


def test_is_undone_if_it_fails_to_begin(vae, monkeypatch):
    begin = tiling._in_tiles

    def fail_at_the_decoder(module, *settings):
        return begin(module, *settings) if module is vae.encoder else len(3)

    monkeypatch.setattr(tiling, "_in_tiles", fail_at_the_decoder)
    vae.use_tiling = True
    with pytest.raises(TypeError), tiled_vae(vae):
        pass
    assert vae.use_tiling


def test_is_undone_also_after_an_error(vae):
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    latents = torch.randn(1, 2, 66, 80)
    with torch.no_grad():
        expected = vae.decode(latents).sample

    def fail(*args):
        raise ZeroDivisionError

    hook = vae.decoder.conv_out.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), tiled_vae(vae):
        vae.decode(latents)
    hook.remove()
    for name, module in vae.named_modules():
        assert vars(module).keys() - {"forward"} == before[name].keys() - {"forward"}
        assert getattr(vars(module).get("forward"), "__self__", module) is module
    assert torch.equal(vae.decode(latents).sample, expected)
    assert torch.equal(copy.deepcopy(vae).decode(latents).sample, expected)
    assert not vae.use_tiling


def test_one_rank_decodes_all_tiles(plain, monkeypatch):
    """The hook of `parallelize` is outside the tiles, so an image is sent once."""

    sent = []

    class Ranks:
        def broadcast(self, make, device):
            sent.append(make())
            return sent[-1]

    monkeypatch.setattr(rank_decode, "entry_hook_of", lambda transformer: SimpleNamespace(sharder=True))
    monkeypatch.setattr(rank_decode, "check_same", lambda *call: None)
    latents, transformer = torch.randn(1, 2, 66, 80), nn.Module()
    with torch.no_grad(), tiled_vae(plain):
        expected = plain.decode(latents).sample
    hook = rank_decode.DecodeOnOneRank(Ranks(), transformer)
    HookRegistry.check_if_exists_or_initialize(plain.decoder).register_hook(hook, "ranks")
    with torch.no_grad(), tiled_vae(plain):
        assert torch.equal(plain.decode(latents).sample, expected)
    assert len(sent) == 1


@pytest.mark.parametrize("kind", ["video", "offloaded"])
def test_other_autoencoders_are_tiled_by_diffusers(kind, plain):
    vae = dummy_pipelines.qwen(QwenImagePipeline).vae if kind == "video" else plain
    if kind == "offloaded":
        cpu_offload(vae, execution_device="cpu")
    forward = vae.decoder.forward
    with tiled_vae(vae):
        assert vae.use_tiling
        assert vae.decoder.forward == forward
    assert not vae.use_tiling
    assert not tiling.has_shared_norms(vae)


@pytest.mark.slow
def test_memory_is_that_of_a_tile_and_the_image(tiled_decoding):
    wide = {"block_out_channels": (32, 64), "norm_num_groups": 8, "mid_block_add_attention": False}
    vae = AutoencoderKL(**{**SMALL, **wide})
    for length in (70, 200):
        latents = torch.randn(1, 2, 70, length)
        bounds = tiled_decode_bytes(vae, 140, 2 * length, tile_side(vae))
        with torch.no_grad(), tiled_vae(vae), tiled_decoding.LiveBytes() as live:
            vae.decode(latents)
        assert bounds.least < live.peak < bounds.likely, live.peak / bounds.likely
    assert tile_side(vae) == SIDE * scale_of(vae)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_borders_do_not_show(noise, tiled_decoding, monkeypatch):
    """The difference from decoding at once is rounding alone, and no larger along borders than elsewhere."""
    monkeypatch.setattr(tiling, "LEAST_SIDE", 384)
    found = tiled_decoding.compare(demo.pipeline().vae, 768, noise)
    ours, plain = found[tiled_decoding.OURS], found[tiled_decoding.NO_OVERLAP]
    assert ours.most < 1e-3  # levels of 255
    assert ours.near <= 1.05 * ours.elsewhere
    assert ours.jump <= 1.05 * ours.change
    assert plain.near > 2 * plain.elsewhere
    assert plain.jump > 5 * plain.change
    theirs = found[tiled_decoding.THEIRS]
    assert theirs.jump > 1.2 * theirs.change
    assert ours.most < theirs.most / 2
