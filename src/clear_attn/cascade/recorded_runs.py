"""Which runs of a plan are recorded for the stage after them, and what that takes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from clear_attn.cascade.growth import side_growth, smaller_sigma
from clear_attn.cascade.pipelines import CascadeTarget, static_schedule
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.recording import Recording, recording_bytes
from clear_attn.cascade.stages import Base, Stage
from clear_attn.profiling.memory import available_memory, pipeline_bytes
from clear_attn.utils.image_sizes import Size
from clear_attn.utils.units import format_bytes


def latent_size(target: CascadeTarget, drawn: Base | Stage) -> Size:
    """Return height and width of an image's latents."""
    scale = int(target.pipe.vae_scale_factor)
    return drawn.size[0] // scale, drawn.size[1] // scale


def steps_of(drawn: Base | Stage) -> int:
    """Return the number of steps of a resolved base image, or those that run of a stage."""
    steps = drawn.steps_run if isinstance(drawn, Stage) else drawn.steps
    assert steps is not None
    return steps


def start_sigma(scheduler: Any, stage: Stage) -> float:
    """Return the noise level at which a stage starts, of a scheduler with a static shift.

    Exact for pipelines that divide 1 to 1 / steps evenly, as all but Stable Diffusion 3's do; for that one about right.
    """
    own = static_schedule(scheduler, stage.shift)
    own.set_timesteps(sigmas=np.linspace(1.0, 1 / stage.steps, stage.steps))
    return float(own.sigmas[stage.steps - stage.steps_run])


def drawn_number(plan: HighresPlan, number: int) -> Base | Stage:
    """Return the settings of the base image, 0, or of a stage."""
    drawn = plan.stages[number - 1] if number else plan.base
    assert drawn
    return drawn


def new_recording(target: CascadeTarget, plan: HighresPlan, number: int) -> Recording | None:
    """Return an empty record of the run of an image, if the stage after it needs one.

    Args:
        target: what draws it.
        plan: with sizes resolved.
        number: 0 for the base image, or the number of a stage.
    """
    if number == len(plan.stages) or not plan.stages[number].needs_recording:
        return None
    stage, size = plan.stages[number], latent_size(target, drawn_number(plan, number))
    if not stage.continues:
        return Recording(size)
    growth = side_growth(size, latent_size(target, stage))
    return Recording(
        size, smaller_sigma(start_sigma(target.pipe.scheduler, stage), growth), ends_there=not stage.stepwise_guidance
    )


def most_recorded_bytes(target: CascadeTarget, plan: HighresPlan) -> int:
    """Return a bound of the main memory that recordings take at one time: of one run, and of the run before it."""
    if not any(stage.needs_recording for stage in plan.stages):
        return 0
    config = target.pipe.vae.config
    channels = getattr(config, "latent_channels", None) or config.z_dim
    after = plan.stages if plan.base else plan.stages[1:]
    each = [
        recording_bytes(latent_size(target, drawn), channels, steps_of(drawn)) * stage.needs_recording
        for drawn, stage in zip(plan.drawn, after, strict=False)
    ]
    return max(sum(pair) for pair in zip([0, *each], [*each, 0], strict=True))


def validate_recordings(target: CascadeTarget, plan: HighresPlan) -> None:
    """Raise ValueError for a stage whose run before cannot be recorded or continued."""
    for number, stage in enumerate(plan.stages, start=1):
        if stage.needs_recording and number == 1 and plan.base is None:
            raise ValueError(
                f"stage 1 has {_names(stage)}, which needs the run of the image before it, and an image was given; "
                "leave out image, so that a base image is drawn, or set this in later stages only"
            )
        if stage.needs_recording and target.transformer.config.get("flow_map"):
            raise ValueError(
                f"stage {number} has {_names(stage)}, which needs predictions of the clean image, and this "
                f"{type(target.transformer).__name__} is a flow map, which predicts jumps; leave it out, or give the "
                "model with flow_map=False"
            )
        if stage.continues:
            _validate_continues(target, plan, number)
    taken, (total, _) = plan.recording_bytes, available_memory(torch.device("cpu"))
    left = total - pipeline_bytes(target.pipe, torch.device("cpu"))
    if taken > left:
        raise ValueError(
            f"the recorded predictions for stepwise_guidance or continues take {format_bytes(taken)} of main memory, "
            f"and {format_bytes(left)} are left beyond the weights; give the runs before such stages fewer steps or a "
            "smaller size"
        )


def _names(stage: Stage) -> str:
    return " and ".join(
        [f"stepwise_guidance={stage.stepwise_guidance}"] * bool(stage.stepwise_guidance)
        + ["continues=True"] * stage.continues
    )


def _validate_continues(target: CascadeTarget, plan: HighresPlan, number: int) -> None:
    scheduler, stage, before = target.pipe.scheduler, plan.stages[number - 1], drawn_number(plan, number - 1)
    if stage.shift is None and scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(
            f"stage {number} continues, and shift=None leaves where it starts to the pipeline; give it a shift, 3 is "
            "usual"
        )
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"stage {number} continues, which a {type(scheduler).__name__} does not support; give the pipeline a "
            "FlowMatchEulerDiscreteScheduler, or leave continues out"
        )
    start = start_sigma(scheduler, stage)
    if start >= 1:
        raise ValueError(
            f"stage {number} continues with strength={stage.strength}, which leaves no step to the smaller size; give "
            "it a lower strength, 0.7 is usual"
        )
    growth = side_growth(latent_size(target, before), latent_size(target, stage))
    if isinstance(before, Stage) and _starts_too_late(scheduler, before, start, growth):
        raise ValueError(
            f"stage {number} continues from a noise level at which stage {number - 1} has not started; give stage "
            f"{number} a strength below {stage.strength}, or stage {number - 1} one above {before.strength}"
        )


def _starts_too_late(scheduler: Any, before: Stage, start: float, growth: float) -> bool:
    """Return whether the stage before starts too late, as far as its start is known."""
    if before.shift is None and scheduler.config.get("use_dynamic_shifting"):
        return False
    return start_sigma(scheduler, before) <= smaller_sigma(start, growth)
