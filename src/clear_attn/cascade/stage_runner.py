"""Draws a plan: the base image, then each stage upon the image before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from torch import Tensor

from clear_attn.cascade.attention_scale import proportional_attention
from clear_attn.cascade.guidance import guide
from clear_attn.cascade.pipelines import kind_of, static_schedule, tiled_vae
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.rope import ntk_scaling
from clear_attn.cascade.stages import Base, Size, Stage, size_name
from clear_attn.models._diffusers import execution_device_of, progress_bar_config_of, reset_interrupt
from clear_attn.patching.context_managers import applied, restored
from clear_attn.patching.linearization import Change
from clear_attn.patching.state import entry_hook_of
from clear_attn.patching.target import find_transformer


class Interrupted(Exception):  # noqa: N818, for it is no error
    """A callback, or another thread, has set `_interrupt` of the pipeline."""


def draw(
    pipe: Any,
    plan: HighresPlan,
    change: Change | None,
    image: Image.Image | None,
    callbacks: dict[str, Any],
    finished: Callable[[Image.Image], None],
) -> None:
    """Draws the first image and that of each stage, and hands on each as soon as it is there.

    Args:
        pipe: as the user gave it.
        plan: what to draw.
        change: linearizes the pipeline for the stages; None if it is linearized as planned.
        image: the first image, where the plan has no base.
        callbacks: keywords of the pipelines' calls.
        finished: takes each image.

    Raises:
        Interrupted: by a callback, or another thread.
    """
    reset_interrupt(pipe)
    if plan.base:
        with restored(pipe) if entry_hook_of(find_transformer(pipe)[0]) else contextlib.nullcontext():
            image = _draw_base(pipe, plan, plan.base, callbacks)
            finished(image)
    else:
        assert image
        image = image.convert("RGB")
        finished(image)
    with applied(change) if change else contextlib.nullcontext():
        for number, stage in enumerate(plan.stages, start=1):
            _stop_if_interrupted(pipe)
            image = _draw_stage(pipe, plan, number, stage, image, callbacks)
            finished(image)


def _draw_base(pipe: Any, plan: HighresPlan, base: Base, callbacks: dict[str, Any]) -> Image.Image:
    runner = kind_of(pipe).from_text(**{**pipe.components, "scheduler": static_schedule(pipe.scheduler, None)})
    settings = {"num_inference_steps": base.steps, "guidance_scale": base.guidance, "generator": _generator(plan, 0)}
    return _run(pipe, runner, plan, 0, base.size, settings, callbacks)


def _draw_stage(
    pipe: Any, plan: HighresPlan, number: int, stage: Stage, image: Image.Image, callbacks: dict[str, Any]
) -> Image.Image:
    scheduler = static_schedule(pipe.scheduler, stage.shift)
    runner = kind_of(pipe).from_image(**{**pipe.components, "scheduler": scheduler})
    generator = _generator(plan, number)
    with contextlib.ExitStack() as around:
        around.enter_context(tiled_vae(pipe.vae))
        if (factor := stage.ntk_factor or 1) != 1:
            around.enter_context(ntk_scaling(pipe, factor))
        if stage.proportional:
            around.enter_context(proportional_attention(pipe))
        latents = _encode(runner, image, stage.size, generator)
        if stage.low_resolution_guidance:
            guide(scheduler, latents, stage.low_resolution_guidance)
        settings = {
            "image": latents,
            "strength": stage.strength,
            "num_inference_steps": stage.steps,
            "guidance_scale": stage.guidance,
            "generator": generator,
        }
        return _run(pipe, runner, plan, number, stage.size, settings, callbacks)


def _run(
    pipe: Any,
    runner: Any,
    plan: HighresPlan,
    number: int,
    size: Size,
    settings: dict[str, Any],
    callbacks: dict[str, Any],
) -> Image.Image:
    title = f"stage {number} of {len(plan.stages)}" if number else "base image"
    runner.set_progress_bar_config(**{"desc": f"{title}, {size_name(size)}", **progress_bar_config_of(pipe)})
    arguments = {**settings, **plan.options, **_heeding(pipe, **callbacks)}
    try:
        return runner(plan.prompt, height=size[0], width=size[1], **arguments).images[0]
    finally:
        # Offloaded models go back to where they wait; this runner has put no hooks on them.
        pipe.maybe_free_model_hooks()


def _heeding(
    pipe: Any, callback_on_step_end: Callable[..., dict[str, Any]] | None, callback_on_step_end_tensor_inputs: list[str]
) -> dict[str, Any]:
    """The caller's callback, after which a pipeline that was interrupted stops at once, and decodes nothing."""

    def on_step_end(runner: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        changed = callback_on_step_end(runner, step, timestep, tensors) if callback_on_step_end else tensors
        _stop_if_interrupted(runner, pipe)
        return changed

    if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
        callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
    return {
        "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
    }


def _stop_if_interrupted(*pipes: Any) -> None:
    if any(each.interrupt for each in pipes):
        raise Interrupted


def _generator(plan: HighresPlan, number: int) -> torch.Generator:
    """The base image's noise is of the plan's seed, stage n's of seed + n."""
    return torch.Generator("cpu").manual_seed(plan.seed + number)


@torch.no_grad()
def _encode(runner: Any, image: Image.Image, size: Size, generator: torch.Generator) -> Tensor:
    """The latents of an image enlarged to a size, as image-to-image pipelines make them, `[1, channels, h, w]`."""
    vae = runner.vae
    enlarged = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = runner.image_processor.preprocess(enlarged).to(execution_device_of(runner), vae.dtype)
    encoded = vae.encode(pixels)
    latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
