"""Continue a smaller run at a larger size: progressive resolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clear_attn.cascade.recording import Handover
from clear_attn.utils.image_sizes import Size


def side_growth(small: Size, large: Size) -> float:
    """Return the factor by which sides grow; the geometric mean of both."""
    return math.sqrt(large[0] * large[1] / (small[0] * small[1]))


def smaller_sigma(sigma: float, growth: float) -> float:
    """Return the noise level at which a smaller run has the signal-to-noise ratio of a larger one.

    Frequencies that both have carry `growth` times more signal in the larger latents, and the same noise, in an
    orthonormal transform. So `(1 - s) / s = growth (1 - t) / t` for the smaller s and the larger t, as in spectral
    progressive diffusion (arXiv 2605.18736): `s = t / (growth - (growth - 1) t)`.

    Args:
        sigma: t, the noise level of the larger run, 0 to 1.
        growth: the factor by which sides grow.

    Examples:
        >>> round(smaller_sigma(0.8, 2), 3)
        0.667
    """
    return sigma / (growth - (growth - 1) * sigma)


def cosines(length: int, count: int, like: Tensor) -> Tensor:
    """Return the first `count` rows of the orthonormal DCT-II of a length, `[count, length]`, float32."""
    position, frequency = torch.arange(length, dtype=torch.float64), torch.arange(count, dtype=torch.float64)
    waves = torch.cos(math.pi / length * frequency[:, None] * (position + 0.5)) * math.sqrt(2 / length)
    waves[0] /= math.sqrt(2)
    return waves.float().to(like.device)


def enlarge_spectrum(latents: Tensor, size: Size) -> Tensor:
    """Return latents of a larger size with the same DCT coefficients, and none above: white noise keeps its variance.

    Args:
        latents: `[batch, channels, height, width]`, float32.
        size: height and width of the result, not smaller.
    """
    height, width = latents.shape[-2:]
    small_rows, small_columns = cosines(height, height, latents), cosines(width, width, latents)
    rows, columns = cosines(size[0], height, latents), cosines(size[1], width, latents)
    return (rows.T @ small_rows) @ latents @ (small_columns.T @ columns)


def without_low_band(noise: Tensor, band: Size) -> Tensor:
    """Return noise without the lowest DCT coefficients, `band` of them along the height and the width."""
    rows, columns = cosines(noise.shape[-2], band[0], noise), cosines(noise.shape[-1], band[1], noise)
    return noise - rows.T @ (rows @ noise @ columns.T) @ columns


def grow(handover: Handover, fresh: Tensor, sigma: float) -> Tensor:
    """Return the noisy latents with which a larger run continues: spectral noise expansion (arXiv 2605.18736).

    Args:
        handover: the smaller run's predictions of the clean latents and of the noise, `[1, channels, height, width]`.
        fresh: white noise in the larger size, which fills the band that the smaller run does not have.
        sigma: the noise level, 0 to 1.

    Returns:
        `(1 - sigma) growth E(clean) + sigma (E(noise) + high(fresh))`, float32, where E is `enlarge_spectrum`. If the
        smaller run is at `smaller_sigma`, its coefficients are those of its latents, all times one factor.
    """
    clean, noise = (x.to(fresh.device) for x in handover)
    small, large = (clean.shape[-2], clean.shape[-1]), (fresh.shape[-2], fresh.shape[-1])
    signal = side_growth(small, large) * enlarge_spectrum(clean, large)
    return (1 - sigma) * signal + sigma * (enlarge_spectrum(noise, large) + without_low_band(fresh.float(), small))


def start_from(scheduler: Any, handover: Handover, size: Size) -> None:
    """Make a scheduler give a run its grown latents where the pipeline asks it to add noise to an image.

    Args:
        scheduler: as for `change_velocity`.
        handover: where the smaller run has got.
        size: height and width of the latents of the larger run.
    """

    def scale_noise(sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        sigma = float(timestep.flatten()[0]) / scheduler.config.num_train_timesteps
        return grow(handover, noise.reshape(1, -1, *size), sigma).to(sample.dtype).reshape(sample.shape)

    scheduler.scale_noise = scale_noise
