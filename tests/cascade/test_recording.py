"""What a run records for the stage after it."""

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError

from clear_attn.cascade.latents import change_velocity, pack
from clear_attn.cascade.recording import (
    Recording,
    load_recording,
    record_handover,
    record_predictions,
    recording_bytes,
    save_recording,
)


def recorded(begin=0, packed=False, change=None, **settings):
    """Run a scheduler with random velocities; return the record and the (sigma, velocity, latents) of each step."""
    generator = torch.Generator().manual_seed(3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    recording = Recording((6, 8), **settings)
    record_handover(scheduler, recording)
    if change:
        change_velocity(scheduler, (6, 8), change)
    record_predictions(scheduler, recording)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(begin)
    sample, steps = torch.randn(1, 4, 6, 8, generator=generator), []
    for number, timestep in enumerate(scheduler.timesteps[begin:]):
        velocity = torch.randn(1, 4, 6, 8, generator=generator)
        steps.append((float(scheduler.sigmas[begin + number]), velocity, sample))
        given = (pack(velocity), pack(sample)) if packed else (velocity, sample)
        found = scheduler.step(given[0], timestep, given[1], return_dict=False)[0]
        sample = sample + (scheduler.sigmas[begin + number + 1] - scheduler.sigmas[begin + number]) * velocity
        if not change:
            torch.testing.assert_close(found, pack(sample) if packed else sample, atol=1e-5, rtol=1e-5)
    return recording, steps


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_every_step_is_recorded(begin, packed):
    recording, steps = recorded(begin, packed)
    assert list(recording.predictions) == pytest.approx([sigma for sigma, *_ in steps])
    for prediction, (sigma, velocity, latents) in zip(recording.predictions.values(), steps, strict=True):
        torch.testing.assert_close(prediction, latents - sigma * velocity, atol=1e-5, rtol=1e-5)
    assert recording.handover is None
    held = sum(each.nbytes for each in recording.predictions.values())
    assert held <= recording_bytes((6, 8), 4, len(steps)) == held + 2 * 4 * 4 * 6 * 8


def test_predictions_are_linear_between_recorded_levels():
    recording, _ = recorded()
    levels = sorted(recording.predictions)
    for low, high in itertools.pairwise(levels):
        for share in (0.0, 0.3, 1.0):
            sigma = low + share * (high - low)
            expected = recording.predictions[low] * (1 - share) + recording.predictions[high] * share
            torch.testing.assert_close(recording.prediction(sigma), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(recording.prediction(0.0), recording.predictions[levels[0]])
    assert torch.equal(recording.prediction(1.0), recording.predictions[levels[-1]])


def test_the_handover_is_of_the_step_that_reaches_it():
    recording, steps = recorded(handover_sigma=0.7, ends_there=True)
    levels = [sigma for sigma, *_ in steps]
    reaching = max(number for number, sigma in enumerate(levels) if sigma > 0.7)
    assert levels[reaching + 1] <= 0.7
    sigma, velocity, latents = steps[reaching]
    clean, noise = recording.handover
    torch.testing.assert_close(clean, latents - sigma * velocity, atol=1e-5, rtol=1e-5)
    # The step's own line from the clean latents to the noise.
    for level in (sigma, 0.7):
        expected = latents + (level - sigma) * velocity
        torch.testing.assert_close((1 - level) * clean + level * noise, expected, atol=1e-5, rtol=1e-5)
    assert recording.ended
    assert not recorded(handover_sigma=0.7)[0].ended
    assert not recorded()[0].ended


def test_predictions_are_of_the_model_and_the_handover_of_the_guided_velocity():
    recording, steps = recorded(handover_sigma=0.999, change=lambda velocity, latents, step: 0 * velocity)
    sigma, velocity, latents = steps[0]
    torch.testing.assert_close(recording.predictions[sigma], latents - sigma * velocity, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(recording.handover.clean, latents)


def test_saved_and_read(tmp_path):
    recording, _ = recorded(handover_sigma=0.7)
    save_recording(recording, tmp_path / "run.safetensors", {"image": "1"})
    loaded, about = load_recording(tmp_path / "run.safetensors")
    assert about == {"image": "1"}
    assert loaded.size == (6, 8)
    for sigma in (1.0, 0.77, 0.1):
        assert torch.equal(loaded.prediction(sigma), recording.prediction(sigma))
    assert all(torch.equal(*pair) for pair in zip(loaded.handover, recording.handover, strict=True))
    without, _ = recorded()
    save_recording(without, tmp_path / "run.safetensors", {})
    assert load_recording(tmp_path / "run.safetensors")[0].handover is None
    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"other\.safetensors is not the record of a run .*; draw the image again"):
        load_recording(tmp_path / "other.safetensors")


def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("clear_attn.utils.tensor_files.save_file", full)
    with pytest.raises(OSError, match=r"run\.safetensors could not be written .*No space left"):
        save_recording(recorded()[0], tmp_path / "run.safetensors", {})
    assert not list(tmp_path.iterdir())
