"""Draw a plan: the base image, then each stage from the image before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from torch import Tensor

from clear_attn.cascade.attention_scale import proportional_attention
from clear_attn.cascade.growth import start_from
from clear_attn.cascade.guidance import guide
from clear_attn.cascade.latents import pack
from clear_attn.cascade.pipelines import CascadeTarget, pipeline_of, static_schedule
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.recorded_runs import latent_size, new_recording
from clear_attn.cascade.recording import Recording, record_handover, record_predictions
from clear_attn.cascade.rope import ntk_scaling
from clear_attn.cascade.stages import Base, Stage
from clear_attn.cascade.stepwise_guidance import guide_by_run, sharpen
from clear_attn.cascade.tiling import tiled_vae
from clear_attn.models._diffusers import (
    execution_device_of,
    progress_bar_config_of,
    reset_interrupt,
    skip_remaining_steps,
)
from clear_attn.patching.context_managers import applied, restored
from clear_attn.patching.linearization import Change
from clear_attn.utils.dtypes import dtype_name
from clear_attn.utils.image_sizes import format_size

StepCallback = Callable[..., dict[str, Any]]


class Interrupted(Exception):  # noqa: N818, for it is not an error
    """A callback or another thread stopped the drawing by setting `pipe._interrupt`."""


class Finished(NamedTuple):
    """Where drawing starts.

    Attributes:
        images: the number of images that are finished.
        image: the last of them; or an image that was given, and is not one of them yet.
        recording: the record of its run, if the next stage needs it.
    """

    images: int = 0
    image: Image.Image | None = None
    recording: Recording | None = None


OnImage = Callable[[Image.Image, Recording | None], None]


class Cascade(NamedTuple):
    """The drawing of one image.

    Attributes:
        target: the pipeline.
        plan: what to draw.
        on_step_end: the caller's callback after each step.
        tensor_inputs: names of the tensors that the callback gets.
    """

    target: CascadeTarget
    plan: HighresPlan
    on_step_end: StepCallback | None
    tensor_inputs: Sequence[str]

    def draw(self, change: Change | None, finished: Finished, on_image: OnImage) -> None:
        """Draw the images that are not finished yet.

        Args:
            change: linearizes the pipeline for the stages; None if it is linearized as planned.
            finished: where to start.
            on_image: called with each image as soon as it is finished, the first one included, and the record of its
                run, if the next stage needs it.

        Raises:
            Interrupted: by a callback or another thread.
            FloatingPointError: latents or an image have NaN or infinity.
        """
        reset_interrupt(self.target.pipe)
        count, image, recording = finished
        if not count:
            if self.plan.base:
                with restored(self.target.pipe) if self.target.hook else contextlib.nullcontext():
                    recording = new_recording(self.target, self.plan, 0)
                    image = self._draw_base(self.plan.base, recording)
                    on_image(image, recording)
            else:
                assert image
                image = image.convert("RGB")
                on_image(image, recording)
        with applied(change) if change else contextlib.nullcontext():
            for number in range(max(count, 1), len(self.plan.stages) + 1):
                _stop_if_interrupted(self.target.pipe)
                assert image
                before, recording = recording, new_recording(self.target, self.plan, number)
                image = self._draw_stage(number, image, before, recording)
                on_image(image, recording)

    def _draw_base(self, base: Base, recording: Recording | None) -> Image.Image:
        pipe = self.target.pipe
        scheduler = static_schedule(pipe.scheduler, None)
        runner = pipeline_of(self.target.text_to_image, pipe, scheduler)
        if recording:
            record_handover(scheduler, recording)
            record_predictions(scheduler, recording)
        settings = {"num_inference_steps": base.steps, "generator": self._generator(0)}
        return self._run(runner, 0, base, settings, recording)

    def _draw_stage(
        self, number: int, image: Image.Image, before: Recording | None, recording: Recording | None
    ) -> Image.Image:
        pipe, generator, stage = self.target.pipe, self._generator(number), self.plan.stages[number - 1]
        scheduler, size = static_schedule(pipe.scheduler, stage.shift), latent_size(self.target, stage)
        runner = pipeline_of(self.target.image_to_image, pipe, scheduler)
        with contextlib.ExitStack() as stack:
            stack.enter_context(tiled_vae(pipe.vae))
            if (factor := stage.ntk_factor or 1) != 1:
                stack.enter_context(ntk_scaling(pipe, factor))
            if stage.proportional:
                stack.enter_context(proportional_attention(pipe))
            if stage.continues:
                assert before
                assert before.handover
                clean = before.handover.clean
                latents = clean.new_zeros(1, clean.shape[1], *size).to(execution_device_of(runner), runner.vae.dtype)
                start_from(scheduler, before.handover, size)
            else:
                latents = self._encode(runner, image, stage, generator)
            if recording:
                record_handover(scheduler, recording)
            if stage.low_resolution_guidance:
                guide(scheduler, latents, stage.low_resolution_guidance)
            if stage.stepwise_guidance:
                assert before
                guide_by_run(scheduler, stage.stepwise_guidance, before, size)
            if recording:
                record_predictions(scheduler, recording)
            start = self.target.pipelines.start(runner, latents, stage.strength, stage.steps, generator)
            return self._run(runner, number, stage, {**start, "generator": generator}, recording)

    def _run(
        self, runner: Any, number: int, drawn: Base | Stage, settings: dict[str, Any], recording: Recording | None
    ) -> Image.Image:
        pipe, options = self.target.pipe, self.plan.options
        name = f"stage {number} of {len(self.plan.stages)}" if number else "base image"
        title = f"{name}, {format_size(drawn.size)}"
        runner.set_progress_bar_config(**{"desc": title, **progress_bar_config_of(pipe)})

        def after_step(runner: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
            given = {name: tensors[name] for name in self.tensor_inputs}
            changed = self.on_step_end(runner, step, timestep, given) if self.on_step_end else given
            _stop_if_interrupted(runner, pipe)
            latents = changed.get("latents", tensors["latents"])
            _validate_finite(latents, f"{title}: the latents after step {step + 1}")
            return {**changed, "latents": _end_early(runner, recording, latents)} if recording else changed

        try:
            decoded = runner(
                prompt=self.plan.prompt,
                height=drawn.height,
                width=drawn.width,
                **{**options, **settings, self.target.pipelines.guidance: drawn.guidance},
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=list(dict.fromkeys(["latents", *self.tensor_inputs])),
                output_type="pt",
            ).images
        finally:
            # Offloaded models go back to the CPU; this runner has no hooks of its own for that.
            pipe.maybe_free_model_hooks()
        _validate_finite(decoded, f"{title}: the decoded pixels")
        images: list[Image.Image] = runner.image_processor.numpy_to_pil(runner.image_processor.pt_to_numpy(decoded))
        return images[0]

    @torch.no_grad()
    def _encode(self, runner: Any, image: Image.Image, stage: Stage, generator: torch.Generator) -> Tensor:
        """Return the latents of an enlarged image, `[1, channels, height, width]`."""
        height, width = stage.size
        enlarged = image.resize((width, height), Image.Resampling.LANCZOS)
        pixels = runner.image_processor.preprocess(enlarged)
        if stage.stepwise_guidance and stage.stepwise_guidance.sharpening:
            pixels = sharpen(pixels, stage.stepwise_guidance.sharpening)
        pixels = pixels.to(execution_device_of(runner), runner.vae.dtype)
        return self.target.pipelines.encode(runner, pixels, generator)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.plan.seed + number)


def callback_inputs(on_step_end: StepCallback | None, tensor_inputs: Sequence[str]) -> list[str]:
    """Return the names of the tensors that a callback gets; a callback of diffusers names them itself."""
    own = isinstance(on_step_end, (PipelineCallback, MultiPipelineCallbacks))
    return list(on_step_end.tensor_inputs if own else tensor_inputs)  # type: ignore[union-attr]


def _end_early(runner: Any, recording: Recording, latents: Tensor) -> Tensor:
    """Return the latents to go on with; after the handover of a run that ends there, what it predicts."""
    if not recording.ended or recording.handover is None:
        return latents
    skip_remaining_steps(runner)
    clean = recording.handover.clean
    return (pack(clean) if latents.ndim == 3 else clean).to(latents)


def _validate_finite(values: Tensor, where: str) -> None:
    if not torch.isfinite(values).all():
        dtype = dtype_name(values.dtype)
        raise FloatingPointError(
            f"{where}, in {dtype}, contain NaN or infinity; where float16 overflows, bfloat16 or float32 usually helps "
            "(pipe.vae.to(torch.float32) for the autoencoder alone); else look at the LoRAs and the guidance scale"
        )


def _stop_if_interrupted(*pipes: Any) -> None:
    if any(each.interrupt for each in pipes):
        raise Interrupted
