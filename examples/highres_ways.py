"""Ways to draw an image larger than those that the small FLUX was trained on."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import FluxPipeline
from PIL import Image

import clear_attn as clear
from clear_attn import Schedule, Stage, StepwiseGuidance, demo
from clear_attn.demo.scenes import SIZE, Scene
from evaluate_small_flux import FEWER_STEPS as STEPS

WINDOW = 8


class Task(NamedTuple):
    """An image to draw."""

    number: int
    scene: Scene
    caption: str
    seed: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


class Drawn(NamedTuple):
    """An image, with what all of its runs took. Seconds are None if they ran on different devices."""

    image: Image.Image
    seconds: float | None
    flops: int
    device: str


def device_of(pipe: FluxPipeline) -> str:
    return torch.cuda.get_device_name() if pipe.device.type == "cuda" else "CPU"


class Way(Protocol):
    """A way to draw a large image."""

    def draw(self, pipe: FluxPipeline, weights: str, task: Task, side: int, base: Drawn) -> Drawn: ...


class Direct(NamedTuple):
    """Text to image at this size. Without a window attention is dense."""

    window: int | None

    def draw(self, pipe: FluxPipeline, weights: str, task: Task, side: int, base: Drawn | None) -> Drawn:
        local = clear.linearized(pipe, self.window, weights=weights) if self.window else contextlib.nullcontext()
        cost = clear.cost(pipe, side, side, window=self.window or WINDOW, text_tokens=demo.TEXT_TOKENS, steps=STEPS)
        call = {"num_inference_steps": STEPS, "max_sequence_length": demo.TEXT_TOKENS, "generator": task.generator}
        with local:
            started = time.perf_counter()
            image = pipe(task.caption, height=side, width=side, **call).images[0]
            seconds = time.perf_counter() - started
        return Drawn(image, seconds, cost.run_flops if self.window else cost.dense_run_flops, device_of(pipe))


class Enlarged(NamedTuple):
    """The base image, only enlarged."""

    def draw(self, pipe: FluxPipeline, weights: str, task: Task, side: int, base: Drawn) -> Drawn:
        return base._replace(image=base.image.resize((side, side), Image.Resampling.LANCZOS))


class Staged(NamedTuple):
    """`highres`, with its base image."""

    stage: Stage
    schedule: Schedule | None = None
    count: int = 1

    def draw(self, pipe: FluxPipeline, weights: str, task: Task, side: int, base: Drawn) -> Drawn:
        """Draw the stages. The base image is drawn again only by those that need its run."""
        growth = (side / SIZE) ** (1 / self.count)
        sides = [round(SIZE * growth ** (number + 1)) for number in range(self.count)]
        started = time.perf_counter()
        result = clear.highres(
            pipe,
            task.caption,
            height=side,
            width=side,
            window=WINDOW,
            schedule=self.schedule,
            weights=weights,
            image=None if self.stage.needs_recording else base.image,
            base=clear.Base(SIZE, SIZE, steps=STEPS) if self.stage.needs_recording else None,
            stages=[replace(self.stage, height=each, width=each) for each in sides],
            seed=task.seed,
            max_sequence_length=demo.TEXT_TOKENS,
        )
        seconds, flops, device = time.perf_counter() - started, result.plan.work(pipe).flops, device_of(pipe)
        if self.stage.needs_recording:
            return Drawn(result.image, seconds, flops, device)
        both = seconds + base.seconds if base.seconds and base.device == device else None
        return Drawn(result.image, both, flops + base.flops, device)


REFINED = Stage.preset("refined")  # starts at a sigma of 0.4
CLOSE = replace(REFINED, low_resolution_guidance=None)
NOISY: dict[str, Any] = {"shift": 3.0}  # starts at 0.67
STEPWISE: dict[str, Any] = {"stepwise_guidance": StepwiseGuidance()}
CONTINUED: dict[str, Any] = {"continues": True}
# Wide windows while a stage decides the layout.
WIDE_FIRST = Schedule(windows_by_sigma=((0.6, 32), (0.3, 16)))
WAYS: dict[str, Way] = {
    "enlarged": Enlarged(),
    "direct, dense": Direct(None),
    "direct, local": Direct(WINDOW),
    "published": Staged(Stage()),
    "published, wide first": Staged(Stage(), WIDE_FIRST),
    "close": Staged(CLOSE),
    "close, wide first": Staged(CLOSE, WIDE_FIRST),
    "close, low resolution": Staged(REFINED),
    "close, low resolution, wide first": Staged(REFINED, WIDE_FIRST),
    "close, low resolution, in two stages": Staged(REFINED, count=2),
    "close, stepwise": Staged(replace(CLOSE, **STEPWISE)),
    "close, stepwise, wide first": Staged(replace(CLOSE, **STEPWISE), WIDE_FIRST),
    "continued": Staged(replace(CLOSE, **CONTINUED)),
    "continued, wide first": Staged(replace(CLOSE, **CONTINUED), WIDE_FIRST),
    "continued, stepwise": Staged(replace(CLOSE, **CONTINUED, **STEPWISE)),
    "continued, stepwise, wide first": Staged(replace(CLOSE, **CONTINUED, **STEPWISE), WIDE_FIRST),
    "noisy": Staged(replace(CLOSE, **NOISY)),
    "noisy, low resolution": Staged(replace(REFINED, **NOISY)),
    "noisy, stepwise": Staged(replace(CLOSE, **NOISY, **STEPWISE)),
    "noisy, continued": Staged(replace(CLOSE, **NOISY, **CONTINUED)),
    "noisy, continued, stepwise": Staged(replace(CLOSE, **NOISY, **CONTINUED, **STEPWISE)),
}
