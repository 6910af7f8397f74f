"""Draws a plan: the base image, then each stage upon the image before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clear_attn.blocks import restored
from clear_attn.highres import sizes
from clear_attn.highres.guidance import guide
from clear_attn.highres.pipelines import kind_of, static_schedule, tiled_vae
from clear_attn.highres.plan import HighresPlan
from clear_attn.highres.proportional import proportional_attention
from clear_attn.highres.rope import ntk_scaling
from clear_attn.highres.stages import Base, Stage


def draw(pipe: Any, plan: HighresPlan, image: Image.Image | None, callbacks: dict[str, Any]) -> Iterator[Image.Image]:
    """Yields the first image and that of each stage, as long as no callback interrupts the pipeline.

    Args:
        pipe: linearized.
        plan: what to draw.
        image: the first image, where the plan has no base.
        callbacks: keywords of the pipelines' calls.
    """
    if plan.base:
        with restored(pipe):
            image = _draw_base(pipe, plan, plan.base, callbacks)
    if image is None:
        return
    image = image.convert("RGB")
    yield image
    for number, stage in enumerate(plan.stages, start=1):
        drawn = _draw_stage(pipe, plan, number, stage, image, callbacks)
        if drawn is None:
            return
        image = drawn
        yield image


def _draw_base(pipe: Any, plan: HighresPlan, base: Base, callbacks: dict[str, Any]) -> Image.Image | None:
    runner = kind_of(pipe).from_text(**{**pipe.components, "scheduler": static_schedule(pipe.scheduler, None)})
    settings = {"num_inference_steps": base.steps, "guidance_scale": base.guidance}
    return _run(pipe, runner, plan, 0, (base.height or 0, base.width or 0), settings, callbacks)


def _draw_stage(
    pipe: Any, plan: HighresPlan, number: int, stage: Stage, image: Image.Image, callbacks: dict[str, Any]
) -> Image.Image | None:
    scheduler = static_schedule(pipe.scheduler, stage.shift)
    runner = kind_of(pipe).from_image(**{**pipe.components, "scheduler": scheduler})
    size = stage.height or 0, stage.width or 0
    generator = _generator(plan, number)
    with contextlib.ExitStack() as around:
        around.enter_context(tiled_vae(pipe.vae))
        if stage.ntk_factor not in (None, 1):
            around.enter_context(ntk_scaling(pipe, float(stage.ntk_factor or 1)))
        if stage.proportional:
            around.enter_context(proportional_attention(pipe))
        latents = encode(runner, image, size, generator)
        if stage.low_resolution_guidance:
            guide(scheduler, latents, stage.low_resolution_guidance)
        settings = {
            "image": latents,
            "strength": stage.strength,
            "num_inference_steps": stage.steps,
            "guidance_scale": stage.guidance,
            "generator": generator,
        }
        return _run(pipe, runner, plan, number, size, settings, callbacks)


def _run(
    pipe: Any,
    runner: Any,
    plan: HighresPlan,
    number: int,
    size: sizes.Size,
    settings: dict[str, Any],
    callbacks: dict[str, Any],
) -> Image.Image | None:
    """One image, or None where a callback interrupted the pipeline."""
    title = f"stage {number} of {len(plan.stages)}" if number else "base image"
    runner.set_progress_bar_config(
        **{"desc": f"{title}, {sizes.name(size)}", **getattr(pipe, "_progress_bar_config", {})}
    )
    arguments = {"generator": _generator(plan, number), **settings, **plan.options, **callbacks}
    drawn = runner(plan.prompt, height=size[0], width=size[1], **arguments).images[0]
    # Offloaded models go back to where they wait; this runner has put no hooks on them.
    pipe.maybe_free_model_hooks()
    return None if runner.interrupt else drawn


def _generator(plan: HighresPlan, number: int) -> torch.Generator:
    """Of each image's own noise, so that a stage can be drawn again without those before it."""
    return torch.Generator("cpu").manual_seed(plan.seed + number)


@torch.no_grad()
def encode(runner: Any, image: Image.Image, size: sizes.Size, generator: torch.Generator) -> Tensor:
    """The latents of an image enlarged to a size, as image-to-image pipelines make them, `[1, channels, h, w]`."""
    vae = runner.vae
    enlarged = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = runner.image_processor.preprocess(enlarged).to(runner._execution_device, vae.dtype)
    encoded = vae.encode(pixels)
    latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
