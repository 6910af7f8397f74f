"""From the arguments of `highres` to a plan: every size and setting filled in, all of it checked."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clear_attn.backends.selection import validate_backend
from clear_attn.cascade.pipelines import (
    Kind,
    check_guidance,
    check_options,
    check_schedule,
    defaults_of,
    kind_of,
    ranks_of,
)
from clear_attn.cascade.plan import HighresPlan, describe, fingerprint
from clear_attn.cascade.rope import check_ntk_factor, has_rotary_embedding
from clear_attn.cascade.stages import Base, Size, Stage, size_name
from clear_attn.methods.schedule import Schedule
from clear_attn.parallel.shard import check_ranks
from clear_attn.patching.linearization import Change
from clear_attn.patching.state import entry_hook_of
from clear_attn.patching.target import find_transformer
from clear_attn.utils.validation import check_whole_number
from clear_attn.weights.metadata import metadata_of

PUBLISHED_NTK_FACTOR = 10.0
# CLEAR's published run is one stage at four times the side.
LARGEST_GROWTH = 4
# As much of its height or width as an image may lose by being enlarged to another size.
LARGEST_DISTORTION = 0.05


def make_plan(
    pipe: Any,
    prompt: str,
    size: Size,
    *,
    image: Image.Image | None,
    base: Base | None,
    stages: Stage | Sequence[Stage],
    seed: int | None,
    window: int | None,
    down_factor: int | None,
    schedule: Schedule | None,
    weights: str | os.PathLike[str] | None,
    revision: str | None,
    backend: str,
    options: dict[str, Any],
) -> HighresPlan:
    """Return a plan whose attention settings are as asked, for `with_settings` to fill in; errors as `highres`."""
    validate_backend(backend)
    kind, (transformer, adapter) = kind_of(pipe), find_transformer(pipe)
    token = adapter.latents_per_token(transformer) * pipe.vae_scale_factor
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got {prompt!r}; call highres once for each picture")
    for name, side in zip(("height", "width"), size, strict=True):
        check_whole_number(name, side, "it is in pixels")
    size, native = rounded(size, token), int(pipe.default_sample_size * pipe.vae_scale_factor)
    derived = image is None and (base is None or base.height is None)
    if image is None:
        if derived:
            _check_not_small(size, native)
        base = _with_defaults(_with_size(base or Base(), base_size(size, native, token), token), kind)
        first = base.size
    else:
        first = _check_image(image, base)
    plan = HighresPlan(
        prompt=prompt,
        height=size[0],
        width=size[1],
        base=base,
        stages=_filled(stages, first, size, token, transformer),
        seed=int(random_seed()) if seed is None else check_whole_number("seed", seed, "any will do", least=0),
        window=window,
        down_factor=down_factor,
        weights=None if weights is None else os.fspath(weights),
        revision=revision,
        backend=backend,
        schedule=schedule,
        options=dict(options),
        image=None if image is None else fingerprint(image),
        model=describe(pipe),
    )
    seen = [first, *(stage.size for stage in plan.stages)]
    for before, after in itertools.pairwise(seen):
        check_grows(before, after)
    if seen[-1] != size:
        raise ValueError(
            f"the last stage draws {size_name(seen[-1])}, and the image is to be {size_name(size)}; leave out its "
            "height and width"
        )
    # Sizes that were not given are rounded to whole tokens, and differ by that.
    asked = [] if isinstance(stages, Stage) else [each for each in stages if each.height is not None]
    for before, after in itertools.pairwise([*([] if derived else [first]), *(each.size for each in asked), size]):
        check_aspect_ratio(before, after, token)
    _check_positions(transformer, adapter.max_grid_side(transformer), plan, token)
    for stage in plan.stages:
        check_schedule(pipe.scheduler, stage.shift)
    check_options(options, kind)
    check_guidance(options, kind, [each.guidance for each in plan.drawn])
    _check_ranks_have_rows(plan, token, ranks_of(pipe))
    return plan


def random_seed(device: torch.device | str = "cpu") -> Tensor:
    """Draw a seed from torch's own generator."""
    return torch.randint(2**31, (), device=device)


def draws_as_it_is(pipe: Any, plan: HighresPlan) -> bool:
    """Return whether a pipeline is linearized and a plan asks for no other settings than its own.

    Raises:
        ValueError: the plan asks for another backend alone.
    """
    hook = entry_hook_of(find_transformer(pipe)[0])
    asked = plan.window, plan.down_factor, plan.schedule, plan.weights, plan.revision
    if hook is None or asked != (None, None, None, "auto", None):
        return False
    if plan.backend not in ("auto", hook.backend):
        raise ValueError(
            f"backend={plan.backend!r} is not that of this linearized pipeline, {hook.backend!r}; leave it out, or "
            "say what to linearize with: window, down_factor, schedule and weights"
        )
    return True


def with_settings(pipe: Any, plan: HighresPlan, change: Change | None) -> HighresPlan:
    """Return a plan with the attention settings of a change, or of a pipeline that is linearized already.

    Raises:
        RuntimeError: they are of another method than CLEAR.
    """
    transformer, _ = find_transformer(pipe)
    hook, metadata = (
        (change.state.hook, change.state.metadata) if change else (entry_hook_of(transformer), metadata_of(transformer))
    )
    assert hook
    method: Any = hook.method
    if method.pooled_factor is None:
        raise RuntimeError(
            f"this pipeline is linearized with {method}, and highres draws with CLEAR; give it weights= of CLEAR "
            "or None, or call clear_attn.restore() first"
        )
    return dataclasses.replace(
        plan,
        window=method.window,
        down_factor=method.down_factor,
        schedule=hook.schedule,
        weights=plan.weights if plan.weights != "auto" else metadata["weights"] if metadata else None,
        backend=hook.backend,
    )


def rounded(size: Size, token: int) -> Size:
    """Return a size in whole tokens, rounded down as diffusers does, with a warning where that changes it.

    Raises:
        ValueError: less than a token.
    """
    if min(size) < token:
        raise ValueError(f"{size_name(size)} is less than one token of {token} px; give the size in pixels")
    whole = size[0] // token * token, size[1] // token * token
    if whole != size:
        warnings.warn(f"{size_name(size)} is no multiple of {token} px; drawing {size_name(whole)}", stacklevel=4)
    return whole


def base_size(size: Size, native: int, token: int) -> Size:
    """Return the size with the native length as its longer side, in whole tokens."""
    height, width = (max(1, round(side * native / max(size) / token)) * token for side in size)
    return height, width


def between(first: Size, last: Size, token: int) -> list[Size]:
    """Return the sizes of the fewest stages that grow by one factor, of about four at most, the last included."""
    growth = max(last[0] / first[0], last[1] / first[1])
    # A base image that was rounded down is not what a further stage is for.
    count = max(1, math.ceil(math.log(growth, LARGEST_GROWTH) - 0.05))
    sizes = [
        (
            round(first[0] * (last[0] / first[0]) ** (number / count) / token) * token,
            round(first[1] * (last[1] / first[1]) ** (number / count) / token) * token,
        )
        for number in range(1, count)
    ]
    return [*sizes, last]


def check_grows(before: Size, after: Size) -> None:
    """Raise ValueError where a size is smaller than the one before it."""
    if after[0] < before[0] or after[1] < before[1]:
        raise ValueError(
            f"a stage of {size_name(after)} is smaller than the {size_name(before)} before it; let stages grow, or "
            "start from a smaller image"
        )


def check_aspect_ratio(before: Size, after: Size, token: int) -> None:
    """Raise ValueError where a size is of another aspect ratio than the one before it.

    Where the longer sides agree, the shorter ones may be less than a token of the smaller size apart, and less than
    5 %.
    """
    sides = before[0] * after[1], before[1] * after[0]
    apart = abs(sides[0] - sides[1])
    if apart >= token * max(after) or apart >= LARGEST_DISTORTION * max(sides):
        share = min(before[0] / after[0], before[1] / after[1])
        wanted = round(after[0] * share), round(after[1] * share)
        raise ValueError(
            f"{size_name(before)} has another aspect ratio than {size_name(after)}; crop it to {size_name(wanted)}, or "
            "ask for another size"
        )


def _check_not_small(size: Size, native: int) -> None:
    if max(size) < native:
        raise ValueError(
            f"{size_name(size)} is smaller than the model's own {native} px; call the pipeline itself, or give "
            "base=Base(height=..., width=...)"
        )


def _with_size(settings: Any, default: Size, token: int) -> Any:
    size = default if settings.height is None else rounded((settings.height, settings.width), token)
    return dataclasses.replace(settings, height=size[0], width=size[1])


def _with_defaults(base: Base, kind: Kind) -> Base:
    defaults = defaults_of(kind.from_text)
    return dataclasses.replace(
        base,
        steps=defaults["num_inference_steps"] if base.steps is None else base.steps,
        guidance=defaults["guidance_scale"] if base.guidance is None else base.guidance,
    )


def _check_image(image: Any, base: Base | None) -> Size:
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got a {type(image).__name__}; open it with PIL.Image.open")
    if base is not None:
        raise ValueError("base and image are both given, and only one can come first; leave one out")
    return image.height, image.width


def _filled(
    stages: Stage | Sequence[Stage], first: Size, last: Size, token: int, transformer: Any
) -> tuple[Stage, ...]:
    if isinstance(stages, Stage):
        if stages.height is not None:
            raise ValueError(f"stages={stages} has a size; give it in a list, or leave its height and width out")
        steps = between(first, last, token)
        stages = [dataclasses.replace(stages, height=size[0], width=size[1]) for size in steps]
    if not stages:
        raise ValueError("stages is empty; give at least one Stage, or leave it out")
    usual = PUBLISHED_NTK_FACTOR if has_rotary_embedding(transformer) else 1.0
    filled = []
    for stage in stages:
        if not isinstance(stage, Stage):
            raise TypeError(f"stages must be clear_attn.Stage each, got a {type(stage).__name__}")
        if stage.ntk_factor is None:
            stage = dataclasses.replace(stage, ntk_factor=usual)
        elif stage.ntk_factor != 1:
            check_ntk_factor(transformer, stage.ntk_factor)
        filled.append(_with_size(stage, last, token))
    return tuple(filled)


def _check_positions(transformer: Any, most: int | None, plan: HighresPlan, token: int) -> None:
    """Raise ValueError if a model has no positions for the rows or columns of a size."""
    for each in plan.drawn:
        if most is not None and max(each.size) > most * token:
            raise ValueError(
                f"this {type(transformer).__name__} has positions for {most} x {most} tokens, "
                f"{size_name((most * token, most * token))}, and {size_name(each.size)} needs more; ask for a smaller "
                "picture, or take a FLUX.1, whose positions have no end"
            )


def _check_ranks_have_rows(plan: HighresPlan, token: int, ranks: int) -> None:
    """Raise ValueError where a stage has too few rows for the processes that an image is split over."""
    for stage in plan.stages if ranks > 1 else ():
        try:
            check_ranks((stage.size[0] // token, stage.size[1] // token), ranks)
        except ValueError as error:
            raise ValueError(f"the stage of {size_name(stage.size)}: {error}") from None
