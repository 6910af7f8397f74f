"""Plan a cascade: resolve every size and setting of `highres`, and validate all of it before anything is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clear_attn.backends.selection import validate_backend
from clear_attn.cascade.pipelines import (
    CascadeTarget,
    call_defaults,
    validate_guidance,
    validate_inputs,
    validate_options,
    validate_shift,
)
from clear_attn.cascade.plan import ATTENTION, HighresPlan, describe, fingerprint
from clear_attn.cascade.recorded_runs import most_recorded_bytes, validate_recordings
from clear_attn.cascade.rope import validate_ntk_factor
from clear_attn.cascade.stages import Base, Stage
from clear_attn.parallel.shard import check_ranks
from clear_attn.patching.linearization import Change
from clear_attn.utils.image_sizes import Size, format_size, round_down
from clear_attn.utils.validation import LARGEST_SEED, check_whole_number
from clear_attn.weights.sources import with_absolute_path

PUBLISHED_NTK_FACTOR = 10.0
# CLEAR's published run is one stage at four times the side.
MAX_GROWTH = 4
# The share of its height or width that an image may lose when it is enlarged to another size.
MAX_DISTORTION = 0.05


def make_plan(
    target: CascadeTarget,
    prompt: str,
    size: Size,
    image: Image.Image | None,
    base: Base | None,
    stages: Stage | Sequence[Stage],
    seed: int | None,
    attention: Mapping[str, Any],
    options: Mapping[str, Any],
) -> HighresPlan:
    """Return the plan of a cascade. Its attention settings are unresolved; `resolve_attention` fills them in.

    Args:
        target: what draws it.
        prompt, image, base, stages, seed, options: as in `highres`, which lists the errors raised.
        size: height and width of the final image in pixels.
        attention: the settings that `linearize` takes.
    """
    validate_backend(attention["backend"])
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got {prompt!r}; call highres once for each image")
    for name, side in zip(("height", "width"), size, strict=True):
        check_whole_number(name, side, "it is in pixels")
    size, token = round_down(size, target.token, stacklevel=3), target.token
    if image is None:
        asked = base or Base()
        if asked.height is None:
            _validate_not_small(size, target.native_side)
        base = _resolve_base(target, asked, size)
        first = base.size
    else:
        first = _validate_image(image, base)
    resolved = _resolve_stages(target, stages, first, size)
    most = LARGEST_SEED - len(resolved)
    seed = int(random_seed()) if seed is None else seed
    seed = check_whole_number("seed", seed, "each stage adds 1 to it", least=0, most=most)
    plan = HighresPlan(
        prompt=prompt,
        height=size[0],
        width=size[1],
        base=base,
        stages=resolved,
        seed=seed,
        **{**attention, "weights": with_absolute_path(attention["weights"])},
        options=dict(options),
        image=None if image is None else fingerprint(image),
        model=describe(target.pipe),
    )
    _validate_sizes(target, plan, first)
    plan = dataclasses.replace(plan, recording_bytes=most_recorded_bytes(target, plan))
    # Sizes that highres chooses are rounded to whole tokens, which changes their aspect ratio. A plan has them too.
    chosen = stage_sizes(first, size, token)
    given = [] if image is None and first == base_size(size, target.native_side, token) else [first]
    if not isinstance(stages, Stage) and [each.size for each in plan.stages] != chosen:
        given += [each.size for each in stages if each.height is not None]
    for before, after in itertools.pairwise([*given, size]):
        validate_aspect_ratio(before, after, token)
    for stage in plan.stages:
        validate_shift(target.pipe.scheduler, stage.shift)
    validate_recordings(target, plan)
    validate_options(target, options)
    validate_guidance(target, options, [each.guidance for each in plan.drawn])
    return plan


def validate_calls(target: CascadeTarget, plan: HighresPlan, tensor_inputs: Sequence[str]) -> None:
    """Raise ValueError for a call of a plan that the check of its diffusers pipeline refuses."""
    given = {**plan.options, "prompt": plan.prompt, "callback_on_step_end_tensor_inputs": tensor_inputs}
    for each in plan.drawn:
        pipeline = target.image_to_image if isinstance(each, Stage) else target.text_to_image
        guidance = {target.pipelines.guidance: each.guidance}
        validate_inputs(pipeline, target.pipe, {**given, **guidance, **dataclasses.asdict(each)})


def random_seed(device: torch.device | str = "cpu") -> Tensor:
    """Draw a seed from torch's own generator."""
    return torch.randint(2**31, (), device=device)


def runs_as_it_is(target: CascadeTarget, plan: HighresPlan) -> bool:
    """Return whether a pipeline is linearized, and a plan asks for nothing or for the settings that it has.

    Raises:
        ValueError: the plan asks for another backend alone.
    """
    hook, asked = target.hook, [getattr(plan, name) for name in ATTENTION if name != "backend"]
    if hook is None:
        return False
    method: Any = hook.method
    if method.pooled_factor is not None and plan.backend in ("auto", hook.backend):
        weights = with_absolute_path(hook.weights)
        if asked == [method.window, method.down_factor, hook.schedule, weights, None]:
            return True
    if asked != [None, None, None, "auto", None]:
        return False
    if plan.backend not in ("auto", hook.backend):
        raise ValueError(
            f"backend={plan.backend!r} is not that of this linearized pipeline, {hook.backend!r}; leave it out, or "
            "say what to linearize with: window, down_factor, schedule and weights"
        )
    return True


def resolve_attention(target: CascadeTarget, plan: HighresPlan, change: Change | None) -> HighresPlan:
    """Return a plan with the attention settings of a change, or of a pipeline that is linearized already.

    Raises:
        RuntimeError: they are of another method than CLEAR.
    """
    hook = change.state.hook if change else target.hook
    assert hook
    method: Any = hook.method
    if method.pooled_factor is None:
        raise RuntimeError(
            f"this pipeline is linearized with {method}, and highres draws with CLEAR; give it weights= of CLEAR "
            "or None, or call clear_attn.restore() first"
        )
    if method.covers((plan.height // target.token, plan.width // target.token)):
        warnings.warn(
            f"{method.as_arguments()} covers {format_size((plan.height, plan.width))}: each image token attends to all "
            "others, and nothing is saved; give a smaller window, or draw a larger image",
            stacklevel=3,
        )
    return dataclasses.replace(
        plan,
        window=method.window,
        down_factor=method.down_factor,
        schedule=hook.schedule,
        weights=with_absolute_path(hook.weights) if plan.weights == "auto" else plan.weights,
        backend=hook.backend,
    )


def base_size(size: Size, native_side: int, token: int) -> Size:
    """Return the size of the base image, in whole tokens: its longer side is the native one."""
    height, width = (max(1, round(side * native_side / max(size) / token)) * token for side in size)
    return height, width


def stage_sizes(first: Size, last: Size, token: int) -> list[Size]:
    """Return the sizes of as few stages as possible that grow by one factor of at most about four, up to the last."""
    growth = max(last[0] / first[0], last[1] / first[1])
    # A base image that was rounded down needs no stage more.
    count = max(1, math.ceil(math.log(growth, MAX_GROWTH) - 0.05))

    def between(start: int, end: int, number: int) -> int:
        return round(start * (end / start) ** (number / count) / token) * token

    sizes = [(between(first[0], last[0], number), between(first[1], last[1], number)) for number in range(1, count)]
    return [*sizes, last]


def validate_growth(before: Size, after: Size) -> None:
    """Raise ValueError for a stage that is smaller than the image before it."""
    if after[0] < before[0] or after[1] < before[1]:
        raise ValueError(
            f"a stage of {format_size(after)} is smaller than the {format_size(before)} before it; let stages grow, or "
            "start from a smaller image"
        )


def validate_aspect_ratio(before: Size, after: Size, token: int) -> None:
    """Raise ValueError for a size with another aspect ratio than the one before it.

    With equal longer sides, the shorter ones may differ by less than a token of the smaller size, and less than 5 %.
    """
    sides = before[0] * after[1], before[1] * after[0]
    apart = abs(sides[0] - sides[1])
    if apart >= token * max(after) or apart >= MAX_DISTORTION * max(sides):
        share = min(before[0] / after[0], before[1] / after[1])
        wanted = round(after[0] * share), round(after[1] * share)
        raise ValueError(
            f"{format_size(before)} has another aspect ratio than {format_size(after)}; crop it to "
            f"{format_size(wanted)}, or ask for another size"
        )


def _validate_not_small(size: Size, native_side: int) -> None:
    if max(size) < native_side:
        raise ValueError(
            f"{format_size(size)} is smaller than the model's own {native_side} px; ask for at least "
            "that, or, in Python, call the pipeline itself or give base=Base(height=..., width=...)"
        )


def _validate_image(image: Any, base: Base | None) -> Size:
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got a {type(image).__name__}; open it with PIL.Image.open")
    if base is not None:
        raise ValueError("base and image are both given, and only one can come first; leave one out")
    return image.height, image.width


def _resolve_size(settings: Any, default: Size, token: int) -> Any:
    size = default if settings.height is None else round_down((settings.height, settings.width), token, stacklevel=5)
    return dataclasses.replace(settings, height=size[0], width=size[1])


def _resolve_base(target: CascadeTarget, base: Base, last: Size) -> Base:
    base = _resolve_size(base, base_size(last, target.native_side, target.token), target.token)
    defaults = call_defaults(target.text_to_image)
    steps = defaults["num_inference_steps"] if base.steps is None else base.steps
    guidance = defaults[target.pipelines.guidance] if base.guidance is None else base.guidance
    return dataclasses.replace(base, steps=steps, guidance=guidance)


def _resolve_stages(
    target: CascadeTarget, stages: Stage | Sequence[Stage], first: Size, last: Size
) -> tuple[Stage, ...]:
    if isinstance(stages, Stage):
        if stages.height is not None:
            raise ValueError(f"stages={stages} has a size; give it in a list, or leave its height and width out")
        sizes = stage_sizes(first, last, target.token)
        stages = [dataclasses.replace(stages, height=size[0], width=size[1]) for size in sizes]
    if not isinstance(stages, Sequence):
        raise TypeError(f"stages must be a clear_attn.Stage or a list of them, got {stages!r}")
    if not stages:
        raise ValueError("stages is empty; give at least one Stage, or leave it out")
    for stage in stages:
        if not isinstance(stage, Stage):
            raise TypeError(f"stages must be clear_attn.Stage each, got a {type(stage).__name__}")
    embedding = target.adapter.rotary_embedding(target.transformer)
    default = 1.0 if embedding is None else PUBLISHED_NTK_FACTOR
    resolved = []
    for stage in stages:
        factor = default if stage.ntk_factor is None else stage.ntk_factor
        if factor != 1:
            validate_ntk_factor(target.transformer, embedding, factor)
        resolved.append(_resolve_size(dataclasses.replace(stage, ntk_factor=factor), last, target.token))
    return tuple(resolved)


def _validate_sizes(target: CascadeTarget, plan: HighresPlan, first: Size) -> None:
    """Raise ValueError for sizes that shrink, miss the final one, or do not suit the model, ranks or guidance."""
    last, token = (plan.height, plan.width), target.token
    sizes = [first, *(stage.size for stage in plan.stages)]
    for before, after in itertools.pairwise(sizes):
        validate_growth(before, after)
    if sizes[-1] != last:
        raise ValueError(
            f"the last stage draws {format_size(sizes[-1])}, and the image is to be {format_size(last)}; leave out its "
            "height and width"
        )
    most = target.adapter.max_grid_side(target.transformer)
    for each in plan.drawn:
        if most is not None and max(each.size) > most * token:
            raise ValueError(
                f"this {type(target.transformer).__name__} has positions for {most} x {most} tokens, "
                f"{format_size((most * token, most * token))}, and {format_size(each.size)} needs more; ask for a "
                "smaller image, or take a FLUX.1, which has no limit"
            )
    for stage in plan.stages:
        latents = max(stage.size) // int(target.pipe.vae_scale_factor)
        levels, most_levels = stage.low_resolution_guidance or 0, (latents - 1).bit_length()
        if levels > most_levels:
            raise ValueError(
                f"low_resolution_guidance={levels} is too much for {format_size(stage.size)}: {most_levels} levels are "
                "means over all its latents; 2 is usual"
            )
        if target.ranks > 1:
            try:
                check_ranks((stage.size[0] // token, stage.size[1] // token), target.ranks)
            except ValueError as error:
                raise ValueError(f"the stage of {format_size(stage.size)}: {error}") from None
