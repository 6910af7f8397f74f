"""Latents of FLUX's token layout, and changes of the velocity that a scheduler steps along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.utils.image_sizes import Size


class Step(NamedTuple):
    """One step of a run.

    Attributes:
        sigma: the noise level of the latents, in (0, 1].
        next_sigma: the noise level after the step.
        done: the number of steps before this one.
        steps: the number of steps of the run.
    """

    sigma: float
    next_sigma: float
    done: int
    steps: int


# Returns the velocity to step along, from the model's velocity and the latents, `[batch, channels, height, width]`.
Change = Callable[[Tensor, Tensor, Step], Tensor]


def change_velocity(scheduler: Any, size: Size, change: Change) -> None:
    """Make a scheduler step along a changed velocity. The scheduler must not be shared.

    Every pipeline passes its final velocity to the scheduler, in raster order and after its own guidance. The change
    that was added last comes first.

    Args:
        scheduler: a flow matching scheduler with timesteps of sigma x num_train_timesteps.
        size: height and width of the latents.
        change: called in each step.
    """
    plain_step = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        velocity, latents = (unpack(x, size) for x in (model_output, sample))
        flow = change(velocity, latents, _parse_step(scheduler, timestep))
        return plain_step(pack(flow) if model_output.ndim == 3 else flow, timestep, sample, *args, **kwargs)

    scheduler.step = step


def _parse_step(scheduler: Any, timestep: Any) -> Step:
    levels, timesteps = scheduler.config.num_train_timesteps, scheduler.timesteps
    steps = len(timesteps) - (scheduler.begin_index or 0)
    later = timesteps[timesteps < timestep]
    following = float(later.max()) / levels if len(later) else 0.0
    return Step(float(timestep) / levels, following, steps - int((timesteps <= timestep).sum()), steps)


def unpack(tokens: Tensor, size: Size) -> Tensor:
    """Return FLUX's tokens of 2 x 2 latents, `[batch, tokens, 4 channels]`, as `[batch, channels, height, width]`."""
    if tokens.ndim == 4:
        return tokens
    height, width = size
    cells = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return torch.einsum("bhwcyx->bchywx", cells).reshape(len(tokens), -1, height, width)


def pack(latents: Tensor) -> Tensor:
    """Return latents as tokens, the inverse of `unpack`."""
    cells = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return torch.einsum("bchywx->bhwcyx", cells).flatten(3).flatten(1, 2)
