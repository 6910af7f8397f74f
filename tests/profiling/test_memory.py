"""Estimated memory of a forward pass and a decoder, compared with torch's profiler."""

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from torch.testing._internal.two_tensor import TwoTensor

import clear_attn as clear
from clear_attn.profiling.memory import weight_bytes
from clear_attn.tools.bench.measure import Subject, _peak_bytes
from tests.helpers.families import FAMILIES


def peak(call):
    # In diffusers, the attention backend that was set last on any model applies to all models.
    with torch.no_grad(), attention_backend("native"):
        call()
        return _peak_bytes(Subject("", lambda mark: call()), torch.device("cpu"))[0]


# Wide models: blocks need more memory than everything else.
WIDE = {"num_attention_heads": 8, "attention_head_dim": 32}
WIDE_MODELS = {
    "flux": {**WIDE, "axes_dims_rope": (8, 12, 12)},
    "sd3": {**WIDE, "caption_projection_dim": 256},
    "flux2": {**WIDE, "axes_dims_rope": (8, 8, 8, 8)},
    "flux3": {**WIDE, "axes_dims_rope": (8, 8, 8, 8)},
    "krea2": {**WIDE, "axes_dims_rope": (8, 12, 12), "num_key_value_heads": 2, "intermediate_size": 683},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("name", [name for name in WIDE_MODELS if name in FAMILIES])
def test_activations_are_between_the_bounds(name, window, dtype):
    family, grid = FAMILIES[name], (24, 32)
    transformer = family.transformer(**WIDE_MODELS[name]).to(dtype)
    call = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() and "ids" not in name else value
        for name, value in family.call(transformer, grid, text=32).items()
    }
    if window:
        clear.linearize(transformer, window, weights=None)
    bounds = clear.cost(transformer, 16 * grid[0], 16 * grid[1], text_tokens=32).memory.activations
    measured = peak(lambda: transformer(**call))
    assert bounds.least < measured < bounds.likely, measured / bounds.likely


@pytest.mark.parametrize("tiling", [False, True])
def test_decoding_is_between_the_bounds(pipe, tiling):
    pipe.vae = AutoencoderKL(**{**pipe.vae.config, "block_out_channels": (32, 64, 128), "latent_channels": 4}).eval()
    pipe.vae.use_tiling = tiling
    memory = clear.cost(pipe, 160, 192).memory
    bounds = memory.decode_tiled if tiling else memory.decode
    latents = torch.randn(1, 4, 40, 48)
    assert bounds.least < peak(lambda: pipe.vae.decode(latents)) < bounds.likely


def test_weights_are_exact(pipe):
    memory = clear.cost(pipe, 128, 128).memory
    assert set(memory.weights) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    counted = sum(x.numel() for x in pipe.transformer.parameters())
    assert memory.weights["transformer"] == weight_bytes(pipe.transformer, "cpu") == 4 * counted
    assert weight_bytes(pipe.transformer, "cuda") == 0
    assert memory.all_weights == sum(memory.weights.values())


def test_the_parts_of_a_quantized_tensor():
    model = torch.nn.Module()
    model.register_buffer("plain", torch.zeros(3))
    model.register_buffer("packed", TwoTensor(torch.zeros(2, 5), TwoTensor(torch.zeros(2, 5), torch.zeros(2, 5))))
    assert weight_bytes(model) == weight_bytes(model, "cpu") == 4 * (3 + 3 * 10)
    assert weight_bytes(model, torch.device("cpu", 1)) == 0


def test_of_flux_dev_at_8192():
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    memory = clear.cost(flux, 8192, 8192).memory
    assert memory.weights == {"transformer": 2 * 11_901_408_320}
    assert memory.activations.least == 5 * 2 * 3072 * (512 * 512 + 512)
    assert str(memory).splitlines() == [
        "Memory: transformer weights 22.2 GiB, activations 7.5 to 30.1 GiB.",
        "Not known: memory of other models and of decoding; clear_attn.cost(pipe, ...) of a loaded one counts them.",
    ]
    assert memory.to_dict()["activations"]["least"] == memory.activations.least


def test_what_is_not_known_is_not_nothing(pipe):
    of_pipeline = clear.cost(pipe, 64, 64).memory
    assert "weights" in str(of_pipeline)
    assert "Weights by model: vae " in str(of_pipeline)
    assert "Not known" not in str(of_pipeline)
    alone = clear.cost(pipe.transformer, 64, 64).memory
    assert (alone.decode, alone.to_dict()["decode"], alone.to_dict()["decode_tiled"]) == (None, None, None)
    pipe.vae.register_to_config(block_out_channels=None)  # a decoder of another kind
    assert str(clear.cost(pipe, 64, 64).memory).endswith("\nNot known: memory of decoding.")
