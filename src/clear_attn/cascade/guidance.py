"""Low-resolution guidance: the low frequencies of the flow are guided toward the previous image."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def low_frequencies(latents: Tensor, level: int) -> Tensor:
    """Return the coarse band of a Haar wavelet transform, at full size.

    Each value is the mean of its cell of 2^level x 2^level. Cells cut by the border are means of the values they have.

    Args:
        latents: `[batch, channels, height, width]`.
        level: 1 or more.
    """
    side = 2**level
    means = F.avg_pool2d(latents, side, ceil_mode=True, count_include_pad=False)
    height, width = latents.shape[-2:]
    return means.repeat_interleave(side, dim=-2)[..., :height, :].repeat_interleave(side, dim=-1)[..., :width]


def guided(velocity: Tensor, latents: Tensor, target: Tensor, sigma: float, weight: float, level: int) -> Tensor:
    """Return I-Max's projected flow (arXiv 2410.07536): `v + w (low(u) - low(v))` with `u = (x - g) / t`.

    Args:
        velocity: v, predicted by the model, `[batch, channels, height, width]`.
        latents: x, noisy latents at time t = sigma, of the same shape.
        target: g, latents of the previous image, enlarged, of the same shape.
        sigma: t, in (0, 1].
        weight: w, in [0, 1].
        level: the level of the wavelet transform.

    Returns:
        The flow, in the shape and dtype of the velocity; computed in float32.
    """
    towards = (latents.float() - target.float()) / sigma
    return (velocity.float() + weight * low_frequencies(towards - velocity.float(), level)).to(velocity.dtype)


def weight_at(progress: float) -> float:
    """Return the weight of the guidance: a cosine from 1 at the first step (progress 0) to 0 after the last (1)."""
    return (1 + math.cos(math.pi * progress)) / 2


def guide(scheduler: Any, target: Tensor, level: int) -> None:
    """Make a scheduler step along the guided flow. The scheduler must not be shared.

    Every pipeline passes its final velocity to the scheduler, in raster order and after its own guidance.

    Args:
        scheduler: a flow matching scheduler with timesteps of sigma x num_train_timesteps.
        target: `[1, channels, height, width]`, scaled like the pipeline's latents.
        level: see `low_frequencies`.
    """
    plain_step = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        sigma = float(timestep) / scheduler.config.num_train_timesteps
        steps = len(scheduler.timesteps) - (scheduler.begin_index or 0)
        done = steps - int((scheduler.timesteps <= timestep).sum())
        velocity, latents = (_unpack(x, target) for x in (model_output, sample))
        flow = guided(velocity, latents, target.to(sample.device), sigma, weight_at(done / steps), level)
        return plain_step(_pack(flow) if model_output.ndim == 3 else flow, timestep, sample, *args, **kwargs)

    scheduler.step = step


def _unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """Return FLUX's tokens of 2 x 2 latents, `[batch, tokens, 4 channels]`, as `[batch, channels, height, width]`."""
    if tokens.ndim == 4:
        return tokens
    height, width = like.shape[-2:]
    cells = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return torch.einsum("bhwcyx->bchywx", cells).reshape(len(tokens), -1, height, width)


def _pack(latents: Tensor) -> Tensor:
    """Return latents as tokens, the inverse of `_unpack`."""
    cells = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return torch.einsum("bchywx->bhwcyx", cells).flatten(3).flatten(1, 2)
