"""The losses of CLEAR (arXiv 2412.16112, section 3.3), all mean squared errors, and the noisy latents they use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return noisy latents x = (1 - sigma) clean + sigma noise, the path of rectified flow (arXiv 2209.03003).

    Args:
        clean, noise: `[batch, ...]`.
        sigma: `[batch]` in 0..1.
    """
    sigma = sigma.to(clean.dtype).view(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


def draw_sigmas(scheme: str, count: int, shift: float, rng: torch.Generator) -> Tensor:
    """Sample shares of noise, `[count]` in 0..1: shift u / (1 + (shift - 1) u), u by a scheme (arXiv 2403.03206).

    Args:
        scheme: of diffusers' `compute_density_for_timestep_sampling`; "none" is uniform, as CLEAR was trained.
        shift: of the model's scheduler, 1 for none.
    """
    u = compute_density_for_timestep_sampling(scheme, count, 0.0, 1.0, 1.29, generator=rng)
    return shift * u / (1 + (shift - 1) * u)


def flow_matching(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Return |prediction - (noise - clean)|^2: the path's velocity with respect to sigma (arXiv 2403.03206)."""
    return F.mse_loss(prediction.float(), noise.float() - clean.float())


def prediction(student: Tensor, teacher: Tensor) -> Tensor:
    """Return |student - teacher|^2 of their predictions of the same noisy latents."""
    return F.mse_loss(student.float(), teacher.float())


def attention(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return |student - teacher|^2 of attention outputs before any projection, averaged over the layers.

    Args:
        student, teacher: by layer `[batch, tokens, heads x head_dim]`, with tokens in the same order.
    """
    each = [F.mse_loss(student[layer].float(), teacher[layer].float()) for layer in teacher]
    return torch.stack(each).mean() if each else torch.zeros(())
