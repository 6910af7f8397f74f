"""Step-wise guidance: each step follows the smaller run's prediction at the same noise level."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.cascade.latents import Step, change_velocity
from clear_attn.cascade.recording import Recording
from clear_attn.cascade.stages import StepwiseGuidance
from clear_attn.utils.image_sizes import Size

BUTTERWORTH_ORDER = 4
# The published run draws the blur's sigma at random from 0.1 to 2 pixels; this is the middle.
BLUR_SIGMA = 1.05


def low_pass(latents: Tensor, cutoff: float) -> Tensor:
    """Return the low frequencies by HiFlow's Butterworth filter of order 4: `1 / (1 + (d / cutoff)^8)`.

    Args:
        latents: `[batch, channels, height, width]`, float32.
        cutoff: the distance at which half is left. `d` is the distance from the zero frequency, and 1 is the highest
            frequency of a side (the Nyquist frequency).
    """
    height, width = latents.shape[-2:]
    rows = torch.fft.fftfreq(height, 0.5, device=latents.device)
    columns = torch.fft.rfftfreq(width, 0.5, device=latents.device)
    distance_sq = rows[:, None] ** 2 + columns**2
    kept = 1 / (1 + (distance_sq / cutoff**2) ** BUTTERWORTH_ORDER)
    return torch.fft.irfft2(torch.fft.rfft2(latents) * kept, s=(height, width))


def enlarge(latents: Tensor, size: Size) -> Tensor:
    """Return latents of another size, bicubic as in HiFlow's published run."""
    return F.interpolate(latents, size, mode="bicubic", align_corners=False)


def sharpen(pixels: Tensor, strength: float) -> Tensor:
    """Return `(1 + strength) x - strength blur(x)` with a Gaussian blur of 3 x 3 pixels, as HiFlow's guide image.

    Args:
        pixels: `[batch, 3, height, width]` of at least 2 x 2 pixels.
        strength: 1 in the published run.
    """
    side = torch.tensor([-1.0, 0.0, 1.0], device=pixels.device)
    weights = torch.softmax(-(side**2) / (2 * BLUR_SIGMA**2), 0).to(pixels.dtype)
    kernel = torch.outer(weights, weights).expand(pixels.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), kernel, groups=pixels.shape[1])
    return (1 + strength) * pixels - strength * blurred


class Velocities(NamedTuple):
    """The velocity that a step took, and the one towards the reference."""

    own: Tensor
    reference: Tensor


def guided_velocities(
    velocity: Tensor,
    latents: Tensor,
    reference: Tensor,
    sigma: float,
    weights: tuple[float, float],
    cutoff: float,
    before: Velocities | None,
) -> Velocities:
    """Return HiFlow's guided velocity (arXiv 2504.06232), and the one towards the reference.

    With `x0 = x - t v`, direction alignment gives `x0 + a (low(r) - low(x0))`, and from it the velocity
    `w = (x - x0) / t`. With `u = (x - r) / t`, acceleration alignment gives `w + b (w' + u - u' - w)`, where w' and u'
    are those of the step before.

    Args:
        velocity: v, predicted by the model, `[batch, channels, height, width]`.
        latents: x, noisy latents at time t = sigma, of the same shape.
        reference: r, the clean latents that the smaller run predicts at t, enlarged to the same shape.
        sigma: t, in (0, 1].
        weights: a and b, 0 to 1.
        cutoff: see `low_pass`.
        before: what this returned in the step before; None in the first step, which has no acceleration.

    Returns:
        Both in float32.
    """
    latents, structure, acceleration = latents.float(), *weights
    clean = latents - sigma * velocity.float()
    clean = clean + structure * low_pass(reference.float() - clean, cutoff)
    own, towards = (latents - clean) / sigma, (latents - reference.float()) / sigma
    if before:
        own = own + acceleration * (before.own + towards - before.reference - own)
    return Velocities(own, towards)


def guide_by_run(scheduler: Any, settings: StepwiseGuidance, run: Recording, size: Size) -> None:
    """Make a scheduler step along the guided velocity. Both weights fall linearly to 0 after the last step.

    Args:
        scheduler: as for `change_velocity`.
        settings: the weights and the filter.
        run: the record of the run before.
        size: height and width of the latents of this run.
    """
    before: Velocities | None = None

    def change(velocity: Tensor, latents: Tensor, step: Step) -> Tensor:
        nonlocal before
        reference = enlarge(run.prediction(step.sigma).to(latents.device), size)
        left = 1 - step.done / step.steps
        weights = (settings.structure * left, settings.acceleration * left)
        before = guided_velocities(velocity, latents, reference, step.sigma, weights, settings.cutoff, before)
        return before.own.to(velocity.dtype)

    change_velocity(scheduler, size, change)
