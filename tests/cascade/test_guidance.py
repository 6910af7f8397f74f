"""Low-resolution guidance."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from clear_attn.cascade.guidance import guide, guided, low_frequencies, weight_at
from clear_attn.cascade.latents import pack, unpack


@pytest.mark.parametrize(("height", "width", "level"), [(8, 12, 1), (8, 12, 2), (7, 10, 2), (3, 5, 3)])
def test_low_frequencies_are_the_means_of_cells(height, width, level):
    latents = torch.randn(2, 3, height, width)
    expected = torch.empty_like(latents)
    side = 2**level
    for top in range(0, height, side):
        for left in range(0, width, side):
            cell = latents[..., top : top + side, left : left + side]
            expected[..., top : top + side, left : left + side] = cell.mean(dim=(-2, -1), keepdim=True)
    low = low_frequencies(latents, level)
    torch.testing.assert_close(low, expected)
    torch.testing.assert_close(low_frequencies(low, level), low)


def test_full_weight_sets_the_low_frequencies_to_the_target():
    velocity, latents, target = torch.randn(3, 4, 8, 8)
    for sigma in (1.0, 0.3):
        flow = guided(velocity[None], latents[None], target[None], sigma, 1.0, 1)
        clean = latents[None] - sigma * flow
        torch.testing.assert_close(low_frequencies(clean, 1), low_frequencies(target[None], 1), atol=1e-5, rtol=1e-5)
        detail = velocity[None] - low_frequencies(velocity[None], 1)
        torch.testing.assert_close(flow - low_frequencies(flow, 1), detail, atol=1e-5, rtol=1e-5)
    assert torch.equal(guided(velocity[None], latents[None], target[None], 0.5, 0.0, 1), velocity[None])


def test_packs_as_flux_does():
    latents = torch.randn(2, 4, 6, 10)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 10)
    assert torch.equal(unpack(packed, (6, 10)), latents)
    assert torch.equal(pack(latents), packed)


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_every_step_is_guided_by_its_own_weight(begin, packed):
    plain, own = (FlowMatchEulerDiscreteScheduler(shift=3.0) for _ in range(2))
    target = torch.randn(1, 4, 6, 8)
    guide(own, target, 1)
    for scheduler in (plain, own):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)
    sample = torch.randn(1, 4, 6, 8)
    for number, timestep in enumerate(plain.timesteps[begin:]):
        velocity = torch.randn(1, 4, 6, 8)
        weight = (1 + math.cos(math.pi * number / (8 - begin))) / 2
        flow = guided(velocity, sample, target, float(plain.sigmas[begin + number]), weight, 1)
        expected = plain.step(flow, timestep, sample, return_dict=False)[0]
        given = (pack(velocity), pack(sample)) if packed else (velocity, sample)
        found = own.step(given[0], timestep, given[1], return_dict=False)[0]
        torch.testing.assert_close(unpack(found, (6, 8)), expected)
        sample = expected


def test_weights_fall_from_one_to_zero():
    assert weight_at(0) == 1
    assert weight_at(0.5) == pytest.approx(0.5)
    assert weight_at(1) == 0


def test_keeps_half_precision():
    velocity, latents, target = torch.randn(3, 4, 8, 8).bfloat16()
    assert guided(velocity[None], latents[None], target[None], 0.5, 0.5, 1).dtype == torch.bfloat16
