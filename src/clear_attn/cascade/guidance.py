"""Low-resolution guidance: the low frequencies of the flow are guided toward the previous image."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clear_attn.cascade.latents import Step, change_velocity


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

    Args:
        scheduler: a flow matching scheduler with timesteps of sigma x num_train_timesteps.
        target: `[1, channels, height, width]`, scaled like the pipeline's latents.
        level: see `low_frequencies`.
    """

    def change(velocity: Tensor, latents: Tensor, step: Step) -> Tensor:
        weight = weight_at(step.done / step.steps)
        return guided(velocity, latents, target.to(latents.device), step.sigma, weight, level)

    change_velocity(scheduler, (target.shape[-2], target.shape[-1]), change)
