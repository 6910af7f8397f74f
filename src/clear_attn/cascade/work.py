"""The attention's work for a whole plan: each run, step by step."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from clear_attn.cascade.pipelines import CascadeTarget, find_cascade_target, static_schedule
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.recorded_runs import drawn_number, new_recording, steps_of
from clear_attn.cascade.stages import Stage
from clear_attn.profiling.attention_cost import cost
from clear_attn.utils.image_sizes import Size, format_size
from clear_attn.utils.units import FLOPS, in_units


@dataclass(frozen=True)
class RunWork:
    """The work of one run of a plan.

    Attributes:
        name: "base image" or "stage 1".
        size: height and width in pixels.
        steps: the number of steps that run.
        flops: FLOPs of attention in all steps, as `clear_attn.cost` counts them.
    """

    name: str
    size: Size
    steps: int
    flops: int


@dataclass(frozen=True)
class PlanWork:
    """The work of all runs of a plan; it prints as a table.

    Attributes:
        runs: the base image, unless an image was given, and each stage.
    """

    runs: tuple[RunWork, ...]

    @property
    def flops(self) -> int:
        """FLOPs of attention in all runs."""
        return sum(run.flops for run in self.runs)

    def __str__(self) -> str:
        cells, unit = in_units([*(run.flops for run in self.runs), self.flops], FLOPS, 4)
        names = [f"{run.name}, {format_size(run.size)}, {run.steps} steps" for run in self.runs] + ["all"]
        widths = max(map(len, names)), max(map(len, cells))
        rows = zip(names, cells, strict=True)
        return "\n".join([f"FLOPs of attention, {unit}", *(f"{n:<{widths[0]}}  {c:>{widths[1]}}" for n, c in rows)])

    __repr__ = __str__


def work_of(plan: HighresPlan, pipe: Any) -> PlanWork:
    """Count the FLOPs of attention of a plan with `clear_attn.cost`; see `HighresPlan.work`."""
    target = find_cascade_target(pipe)
    first = 0 if plan.base else 1
    return PlanWork(tuple(_work_of_run(target, plan, number + first) for number in range(len(plan.drawn))))


def _work_of_run(target: CascadeTarget, plan: HighresPlan, number: int) -> RunWork:
    drawn = drawn_number(plan, number)
    tokens = plan.options.get("max_sequence_length")
    passes = target.passes(drawn.guidance, plan.options)
    sigmas = run_sigmas(target, plan, number)
    counted = cost(
        target.pipe,
        *drawn.size,
        window=plan.window,
        down_factor=plan.down_factor,
        schedule=plan.schedule,
        text_tokens=tokens,
        batch=passes.batch,
        sigmas=sigmas,
    )
    flops = passes.number * (counted.run_flops if number else counted.dense_run_flops)
    return RunWork(f"stage {number}" if number else "base image", drawn.size, len(sigmas), flops)


def run_sigmas(target: CascadeTarget, plan: HighresPlan, number: int) -> list[float]:
    """Return the noise levels of the steps that run for an image: without those after a handover that ends the run.

    Raises:
        ValueError: the scheduler takes no sigmas.
    """
    drawn = drawn_number(plan, number)
    scheduler = static_schedule(target.pipe.scheduler, drawn.shift if isinstance(drawn, Stage) else None)
    tokens = drawn.size[0] * drawn.size[1] // target.token**2
    whole = drawn.steps if isinstance(drawn, Stage) else steps_of(drawn)
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"the work of a plan needs the sigmas of its steps, and a {type(scheduler).__name__} takes none; give the "
            "pipeline a FlowMatchEulerDiscreteScheduler"
        )
    settings = target.adapter.timestep_settings(target.pipe, tokens, whole)
    if not scheduler.config.get("use_dynamic_shifting"):
        settings.pop("mu", None)
    scheduler.set_timesteps(**settings)
    sigmas: list[float] = scheduler.sigmas[whole - steps_of(drawn) : whole].tolist()
    recording = new_recording(target, plan, number)
    if recording is None or not recording.ends_there or recording.handover_sigma is None:
        return sigmas
    return sigmas[: max(1, sum(sigma > recording.handover_sigma for sigma in sigmas))]
