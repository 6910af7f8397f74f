"""What a run leaves for the stage after it: its predictions of the clean image, and its state where that one starts."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clear_attn.cascade.latents import Step, change_velocity
from clear_attn.utils.atomic import atomic_file
from clear_attn.utils.image_sizes import Size
from clear_attn.utils.tensor_files import write_tensors


class Handover(NamedTuple):
    """The prediction at which a larger run takes over: latents at noise level t are `(1 - t) clean + t noise`.

    Attributes:
        clean: the predicted clean latents, `[1, channels, height, width]`, float32, on the CPU.
        noise: the predicted noise, of the same shape.
    """

    clean: Tensor
    noise: Tensor


@dataclass
class Recording:
    """The record of one run.

    Attributes:
        size: height and width of the latents.
        handover_sigma: the noise level at which a larger run takes over; None if none does.
        ends_there: whether the run ends at that noise level.
        predictions: for each noise level, the prediction of the clean latents, as in `Handover`.
        handover: the state at `handover_sigma`, as soon as the run has got there.
    """

    size: Size
    handover_sigma: float | None = None
    ends_there: bool = False
    predictions: dict[float, Tensor] = field(default_factory=dict)
    handover: Handover | None = None

    @property
    def ended(self) -> bool:
        """Whether the rest of the run is not needed."""
        return self.ends_there and self.handover is not None

    def prediction(self, sigma: float) -> Tensor:
        """Return the prediction of the clean latents at a noise level.

        HiFlow (arXiv 2504.06232) runs all sizes at the same timesteps. Where they differ, this interpolates linearly in
        sigma, in which flow matching is linear: `x = (1 - sigma) x0 + sigma noise`. Outside the recorded levels it is
        the nearest recorded prediction; the last one is the finished image.

        Args:
            sigma: a noise level, 0 to 1.

        Examples:
            >>> run = Recording((1, 1), predictions={1.0: torch.zeros(1, 1, 1, 1), 0.5: torch.ones(1, 1, 1, 1)})
            >>> [round(run.prediction(sigma).item(), 2) for sigma in (1.0, 0.6, 0.2)]
            [0.0, 0.8, 1.0]
        """
        levels = sorted(self.predictions)
        above = min(bisect.bisect_left(levels, sigma), len(levels) - 1)
        below = max(above - 1, 0)
        low, high = levels[below], levels[above]
        if above == below or sigma >= high:
            return self.predictions[high]
        weight = max(0.0, (sigma - low) / (high - low))
        return torch.lerp(self.predictions[low], self.predictions[high], weight)


def recording_bytes(size: Size, channels: int, steps: int) -> int:
    """Return the memory of a recording of a run: float32 predictions of each step, and a handover of two more."""
    return 4 * channels * size[0] * size[1] * (steps + 2)


def record_predictions(scheduler: Any, recording: Recording) -> None:
    """Make a scheduler record x0 = x - sigma v of each step. Add it last: before any guidance, as HiFlow does."""

    def record(velocity: Tensor, latents: Tensor, step: Step) -> Tensor:
        recording.predictions[step.sigma] = _split(velocity, latents, step.sigma).clean.cpu()
        return velocity

    change_velocity(scheduler, recording.size, record)


def record_handover(scheduler: Any, recording: Recording) -> None:
    """Make a scheduler record the step that reaches the handover. Add it first: the velocity is the guided one."""

    def record(velocity: Tensor, latents: Tensor, step: Step) -> Tensor:
        reached = recording.handover_sigma is not None and step.next_sigma <= recording.handover_sigma
        if reached and recording.handover is None:
            clean, noise = _split(velocity, latents, step.sigma)
            recording.handover = Handover(clean.cpu(), noise.cpu())
        return velocity

    change_velocity(scheduler, recording.size, record)


def _split(velocity: Tensor, latents: Tensor, sigma: float) -> Handover:
    """Return the clean latents and the noise between which a velocity leads: x = (1 - sigma) x0 + sigma noise."""
    velocity, latents = velocity.float(), latents.float()
    return Handover(latents - sigma * velocity, latents + (1 - sigma) * velocity)


def save_recording(recording: Recording, file: Path, about: dict[str, str]) -> None:
    """Save the predictions and the handover of a finished run as safetensors, with metadata about it.

    Raises:
        OSError: the file cannot be written.
    """
    levels = sorted(recording.predictions, reverse=True)
    tensors = {
        "sigmas": torch.tensor(levels, dtype=torch.float64),
        "predictions": torch.cat([recording.predictions[level] for level in levels]),
        **(recording.handover._asdict() if recording.handover else {}),
    }
    with atomic_file(file) as unfinished:
        write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, about)


def load_recording(file: Path) -> tuple[Recording, dict[str, str]]:
    """Read what `save_recording` wrote, and the metadata about it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the record of a run.
    """
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
        predictions, handover = tensors["predictions"], [tensors.get(name) for name in Handover._fields]
        by_sigma = dict(zip(tensors["sigmas"].tolist(), predictions.split(1), strict=True))
        size = (predictions.shape[-2], predictions.shape[-1])
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{file} is not the record of a run ({error}); draw the image again") from error
    clean, noise = handover
    state = None if clean is None or noise is None else Handover(clean, noise)
    return Recording(size, predictions=by_sigma, handover=state), about
