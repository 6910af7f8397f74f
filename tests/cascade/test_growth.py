"""Continuing a smaller run at a larger size."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from clear_attn.cascade.growth import enlarge_spectrum, grow, side_growth, smaller_sigma, start_from, without_low_band
from clear_attn.cascade.recording import Handover


def coefficients(x):
    """The orthonormal DCT-II of both sides, by its definition."""

    def matrix(length):
        rows = [
            [
                math.sqrt((1 if row == 0 else 2) / length) * math.cos(math.pi * row * (2 * at + 1) / (2 * length))
                for at in range(length)
            ]
            for row in range(length)
        ]
        return torch.tensor(rows)

    return matrix(x.shape[-2]) @ x @ matrix(x.shape[-1]).T


@pytest.mark.parametrize(("small", "large"), [((4, 6), (8, 12)), ((5, 4), (7, 9)), ((4, 4), (4, 4))])
def test_the_spectrum_is_kept_and_nothing_is_above(small, large):
    latents = torch.randn(2, 3, *small)
    spectrum = coefficients(enlarge_spectrum(latents, large))
    expected = torch.zeros(2, 3, *large)
    expected[..., : small[0], : small[1]] = coefficients(latents)
    torch.testing.assert_close(spectrum, expected, atol=1e-5, rtol=1e-5)
    noise = torch.randn(1, 3, *large)
    expected = coefficients(noise)
    expected[..., : small[0], : small[1]] = 0
    torch.testing.assert_close(coefficients(without_low_band(noise, small)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("small", "large", "sigma"), [((4, 6), (8, 12), 0.8), ((5, 4), (7, 9), 0.4)])
def test_the_low_band_continues_the_smaller_run_and_the_rest_is_noise(small, large, sigma):
    clean, noise = torch.randn(2, 1, 3, *small)
    fresh = torch.randn(1, 3, *large)
    grown = coefficients(grow(Handover(clean, noise), fresh, sigma))
    growth = math.sqrt(large[0] * large[1] / (small[0] * small[1]))
    assert side_growth(small, large) == pytest.approx(growth)
    level = smaller_sigma(sigma, growth)
    assert (1 - level) / level == pytest.approx((1 - sigma) / sigma * growth)
    # All coefficients of the smaller run's latents, times one factor: its ratio of signal to noise is kept.
    low = coefficients((1 - level) * clean + level * noise) * (sigma / level)
    torch.testing.assert_close(grown[..., : small[0], : small[1]], low, atol=1e-5, rtol=1e-5)
    high = coefficients(sigma * fresh)
    high[..., : small[0], : small[1]] = low
    torch.testing.assert_close(grown, high, atol=1e-5, rtol=1e-5)


def test_flat_latents_stay_flat_and_the_noise_keeps_its_variance():
    flat = grow(Handover(torch.full((1, 2, 4, 6), 1.5), torch.zeros(1, 2, 4, 6)), torch.zeros(1, 2, 8, 12), 0.0)
    torch.testing.assert_close(flat, torch.full((1, 2, 8, 12), 1.5))
    noise = grow(Handover(torch.zeros(1, 16, 32, 32), torch.randn(1, 16, 32, 32)), torch.randn(1, 16, 64, 64), 1.0)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("frames", [(), (1,)])
def test_a_pipeline_that_adds_noise_gets_the_grown_latents(frames):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    handover = Handover(*torch.randn(2, 1, 4, 4, 6))
    start_from(scheduler, handover, (8, 12))
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    noise = torch.randn(1, *frames, 4, 8, 12)
    found = scheduler.scale_noise(torch.zeros_like(noise), scheduler.timesteps[3:4], noise)
    expected = grow(handover, noise.reshape(1, 4, 8, 12), float(scheduler.sigmas[3]))
    assert found.shape == noise.shape
    torch.testing.assert_close(found.reshape(1, 4, 8, 12), expected)
