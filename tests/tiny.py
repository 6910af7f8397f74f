"""Small random models, built offline."""

import copy
import functools

import torch
from diffusers import FluxTransformer2DModel

from clear_attn import demo


def flux_transformer(guidance=False, **changes):
    """A random FLUX of two double and two single blocks, 2 heads of 16."""
    config = {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "axes_dims_rope": (4, 6, 6),
    }
    torch.manual_seed(1)
    return FluxTransformer2DModel(**{**config, "guidance_embeds": guidance, **changes}).eval()


@functools.cache
def _demo_pipeline():
    return demo.pipeline()


def flux_pipeline():
    """The small FLUX in the box; a copy, for tests change it."""
    return copy.deepcopy(_demo_pipeline())


def image_ids(*grids):
    """`img_ids` of one picture and, as in Kontext, of its reference pictures."""
    parts = []
    for number, (height, width) in enumerate(grids):
        yx = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        parts.append(torch.cat([torch.full((height * width, 1), number), yx], dim=1))
    return torch.cat(parts).float()


def flux_call(transformer, *grids, text=7, batch=1, seed=0, controlnet=False):
    """Keywords of a forward call with random values."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=rng)

    config, tokens = transformer.config, sum(height * width for height, width in grids)
    inner = config.num_attention_heads * config.attention_head_dim
    call = {
        "hidden_states": random(batch, tokens, config.in_channels),
        "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": image_ids(*grids),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5) if config.guidance_embeds else None,
    }
    if controlnet:
        call["controlnet_block_samples"] = [random(batch, tokens, inner) for _ in range(config.num_layers)]
        call["controlnet_single_block_samples"] = [random(batch, tokens, inner)]
    return call
