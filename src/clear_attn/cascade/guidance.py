"""Low-resolution guidance: the flow's low frequencies drawn towards an image that was there before."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def low_frequencies(latents: Tensor, level: int) -> Tensor:
    """The coarse band of a Haar wavelet transform of so many levels, at full size.

    That is, the mean of each cell of 2^level x 2^level, in the place of all its values; cells that the border cuts
    are means of what they have.

    Args:
        latents: `[batch, channels, height, width]`.
        level: 1 or more.
    """
    side = 2**level
    means = F.avg_pool2d(latents, side, ceil_mode=True, count_include_pad=False)
    height, width = latents.shape[-2:]
    return means.repeat_interleave(side, dim=-2)[..., :height, :].repeat_interleave(side, dim=-1)[..., :width]


def guided(velocity: Tensor, latents: Tensor, target: Tensor, sigma: float, weight: float, level: int) -> Tensor:
    """I-Max's projected flow (arXiv 2410.07536): `v + w (low(u) - low(v))` with `u = (x - g) / t`.

    Args:
        velocity: v, the model's.
        latents: x, noisy, at time t = sigma.
        target: g, the latents of the image so far, enlarged.
        sigma: in (0, 1].
        weight: w.
        level: of the wavelet transform.

    Returns:
        As the velocity; tensors are `[batch, channels, height, width]`.
    """
    towards = (latents.float() - target.float()) / sigma
    return (velocity.float() + weight * low_frequencies(towards - velocity.float(), level)).to(velocity.dtype)


def weight_at(progress: float) -> float:
    """The weight of the guidance, a cosine from 1 at the first step to 0 after the last one; progress in [0, 1]."""
    return (1 + math.cos(math.pi * progress)) / 2


def guide(scheduler: Any, target: Tensor, level: int) -> None:
    """Makes a scheduler, which must be nobody else's, step along the guided flow.

    The scheduler is where every pipeline's final velocity arrives, in raster order and after its own guidance.

    Args:
        scheduler: of flow matching, with timesteps of sigma x num_train_timesteps.
        target: `[1, channels, height, width]`, scaled as the pipeline's latents are.
        level: see `low_frequencies`.
    """
    plain_step = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        sigma = float(timestep) / scheduler.config.num_train_timesteps
        steps = len(scheduler.timesteps) - (scheduler.begin_index or 0)
        done = steps - int((scheduler.timesteps <= timestep).sum())
        velocity, latents = (_unpacked(x, target) for x in (model_output, sample))
        flow = guided(velocity, latents, target.to(sample.device), sigma, weight_at(done / steps), level)
        return plain_step(_packed(flow) if model_output.ndim == 3 else flow, timestep, sample, *args, **kwargs)

    scheduler.step = step


def _unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """FLUX's tokens of 2 x 2 latents, `[batch, tokens, 4 channels]`, as a picture; pictures stay."""
    if tokens.ndim == 4:
        return tokens
    height, width = like.shape[-2:]
    cells = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return torch.einsum("bhwcyx->bchywx", cells).reshape(len(tokens), -1, height, width)


def _packed(picture: Tensor) -> Tensor:
    """The reverse of `_unpacked`."""
    cells = picture.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return torch.einsum("bchywx->bhwcyx", cells).flatten(3).flatten(1, 2)
