"""Guidance by the run before, against HiFlow's formulas written again."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import clear_attn as clear
from clear_attn.cascade.latents import pack, unpack
from clear_attn.cascade.recording import Recording
from clear_attn.cascade.stepwise_guidance import guide_by_run, low_pass, sharpen


def dense_low_pass(x, cutoff):
    """The Butterworth filter as a loop over a centered spectrum."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1))
    for row in range(height):
        for column in range(width):
            distance_sq = ((row - height // 2) / (height / 2)) ** 2 + ((column - width // 2) / (width / 2)) ** 2
            spectrum[..., row, column] *= 1 / (1 + (distance_sq / cutoff**2) ** 4)
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.float()


@pytest.mark.parametrize("size", [(8, 12), (7, 10), (9, 5), (2, 2)])
@pytest.mark.parametrize("cutoff", [0.2, 0.75])
def test_low_pass_is_the_butterworth_filter(size, cutoff):
    latents = torch.randn(2, 3, *size)
    torch.testing.assert_close(low_pass(latents, cutoff), dense_low_pass(latents, cutoff), atol=1e-5, rtol=1e-4)
    flat = torch.full((1, 1, *size), 3.0)
    torch.testing.assert_close(low_pass(flat, cutoff), flat)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_sharpening_adds_the_difference_from_a_blur(strength):
    pixels = torch.randn(2, 3, 6, 7)
    weights = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 1.05**2))
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    sharp = sharpen(pixels, strength)
    for row in range(1, 5):
        for column in range(1, 6):
            blurred = (pixels[..., row - 1 : row + 2, column - 1 : column + 2] * weights).sum((-2, -1))
            expected = pixels[..., row, column] + strength * (pixels[..., row, column] - blurred)
            torch.testing.assert_close(sharp[..., row, column], expected, atol=1e-5, rtol=1e-5)
    flat = torch.full((1, 3, 4, 4), 0.5)
    torch.testing.assert_close(sharpen(flat, strength), flat)


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_every_step_follows_hiflow(begin, packed):
    settings = clear.StepwiseGuidance(structure=0.8, acceleration=0.4, cutoff=0.5)
    plain, own = (FlowMatchEulerDiscreteScheduler(shift=3.0) for _ in range(2))
    run = Recording((3, 4), predictions={sigma: torch.randn(1, 4, 3, 4) for sigma in (1.0, 0.6, 0.2)})
    guide_by_run(own, settings, run, (6, 8))
    for scheduler in (plain, own):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)
    sample, before = torch.randn(1, 4, 6, 8), None
    for number, timestep in enumerate(plain.timesteps[begin:]):
        velocity = torch.randn(1, 4, 6, 8)
        given = (pack(velocity), pack(sample)) if packed else (velocity, sample)
        found = own.step(given[0], timestep, given[1], return_dict=False)[0]

        sigma, left = float(plain.sigmas[begin + number]), (8 - begin - number) / (8 - begin)
        reference = torch.nn.functional.interpolate(run.prediction(sigma), (6, 8), mode="bicubic")
        clean = sample - sigma * velocity
        low = [dense_low_pass(x, 0.5) for x in (reference, clean)]
        flow = (sample - (clean + 0.8 * left * (low[0] - low[1]))) / sigma
        towards = (sample - reference) / sigma
        if before:
            flow = flow + 0.4 * left * (before[0] + towards - before[1] - flow)
        before = flow, towards
        sample = plain.step(flow, timestep, sample, return_dict=False)[0]
        torch.testing.assert_close(unpack(found, (6, 8)), sample, atol=1e-4, rtol=1e-4)


def test_weights_of_zero_change_nothing_and_dtypes_are_kept():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    guide_by_run(
        scheduler, clear.StepwiseGuidance(structure=0, acceleration=0), Recording((3, 4), predictions={
            1.0: torch.randn(1, 4, 3, 4)}), (6, 8)
    )  # fmt: skip
    scheduler.set_timesteps(4)
    velocity, sample = torch.randn(2, 1, 4, 6, 8).bfloat16()
    found = scheduler.step(velocity, scheduler.timesteps[0], sample, return_dict=False)[0]
    assert found.dtype == torch.bfloat16
    expected = sample.float() + float(scheduler.sigmas[1] - scheduler.sigmas[0]) * velocity.float()
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
