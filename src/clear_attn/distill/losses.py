"""The losses of CLEAR (arXiv 2412.16112, section 3.3), which are mean squared errors, and the noisy latents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return noisy latents x = (1 - sigma) clean + sigma noise, the path of rectified flow (arXiv 2209.03003).

    Args:
        clean, noise: the clean latents and the noise, `[batch, ...]`.
        sigma: the share of noise, `[batch]` in 0..1.
    """
    sigma = sigma.to(clean.dtype).view(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


def draw_sigmas(scheme: str, count: int, shift: float, rng: torch.Generator) -> Tensor:
    """Sample sigmas `[count]` in 0..1 as shift u / (1 + (shift - 1) u), with u from a scheme (arXiv 2403.03206).

    Args:
        scheme: a scheme of diffusers' `compute_density_for_timestep_sampling`; "none" is uniform, as in CLEAR.
        count: the number of samples.
        shift: the shift of the model's scheduler, 1 for none.
        rng: a generator on the CPU.
    """
    u = compute_density_for_timestep_sampling(scheme, count, 0.0, 1.0, 1.29, generator=rng)
    return shift * u / (1 + (shift - 1) * u)


def flow_matching(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Return |prediction - (noise - clean)|^2, where noise - clean is the path's velocity (arXiv 2403.03206)."""
    return F.mse_loss(prediction.float(), noise.float() - clean.float())


def prediction(student: Tensor, teacher: Tensor) -> Tensor:
    """Return |student - teacher|^2 of the predictions for the same noisy latents."""
    return F.mse_loss(student.float(), teacher.float())


def attention(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return |student - teacher|^2 of attention outputs before any projection, averaged over the layers.

    Args:
        student, teacher: attention outputs by layer, `[batch, tokens, heads x head_dim]`, tokens in the same order.
    """
    each = [F.mse_loss(student[layer].float(), teacher[layer].float()) for layer in teacher]
    return torch.stack(each).mean() if each else torch.zeros(())
