"""From what is asked of `highres` to a plan: every size and setting filled in, all of it checked."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clear_attn.backends import check_backend
from clear_attn.cascade import sizes
from clear_attn.cascade.pipelines import Kind, check_schedule, defaults_of, kind_of
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.rope import check_ntk_factor, has_rotary_embedding
from clear_attn.cascade.stages import Base, Stage, check_number
from clear_attn.patching.linearization import find_transformer
from clear_attn.utils.validation import check_whole_number

PUBLISHED_NTK_FACTOR = 10.0

# What a plan says in other words, and where.
ELSEWHERE = {
    "num_inference_steps": "steps of Base and Stage",
    "guidance_scale": "guidance of Base and Stage",
    "strength": "strength of Stage",
    "generator": "seed",
    "sigmas": "shift and steps of Stage",
    "mu": "shift of Stage",
    "latents": "seed, or image",
    "num_images_per_prompt": "one call for each picture",
    "output_type": "the result's images",
    "return_dict": "the result",
}
# What highres names itself, and what is no plain data.
OWN = {"self", "prompt", "height", "width", "image", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
TENSORS = ("embeds", "ip_adapter_image")


def make_plan(
    pipe: Any,
    prompt: str,
    size: sizes.Size,
    image: Image.Image | None,
    base: Base | None,
    stages: Stage | Sequence[Stage],
    seed: int | None,
    weights: str | os.PathLike[str] | None,
    revision: str | None,
    backend: str,
    options: dict[str, Any],
) -> HighresPlan:
    """A plan but for window and down_factor, which the weights may say; errors as `highres` tells."""
    check_backend(backend)
    kind, (transformer, family) = kind_of(pipe), find_transformer(pipe)
    token = family.latents_per_token(transformer) * pipe.vae_scale_factor
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got {prompt!r}; call highres once for each picture")
    for name, side in zip(("height", "width"), size, strict=True):
        check_whole_number(name, side, "it is in pixels")
    size = sizes.rounded(size, token)
    derived = image is None and (base is None or base.height is None)
    if image is None:
        if derived:
            _check_not_small(size, _native(pipe))
        base = _with_size(base or Base(), sizes.base_size(size, _native(pipe), token), token)
        base, first = _with_defaults(base, kind), base.size
    else:
        first = _check_image(image, base)
    filled = _stages(stages, first, size, token, transformer)
    seen = [first, *(stage.size for stage in filled)]
    for before, after in itertools.pairwise(seen):
        sizes.check_grows(before, after)
    if seen[-1] != size:
        raise ValueError(
            f"the last stage draws {sizes.name(seen[-1])}, and the picture is to be {sizes.name(size)}; leave out its "
            "height and width"
        )
    # Sizes that were not given are rounded to whole tokens, and differ by that.
    asked = [] if isinstance(stages, Stage) else [each for each in stages if each.height is not None]
    given = [*([] if derived else [first]), *(each.size for each in asked), size]
    for before, after in itertools.pairwise(given):
        sizes.check_aspect_ratio(before, after, token)
    _check_positions(transformer, family.max_grid_side(transformer), seen[image is not None :], token)
    for stage in filled:
        check_schedule(pipe.scheduler, stage.shift)
    _check_options(options, kind)
    _check_guided(options, kind, [*([base] if base else []), *filled])
    return HighresPlan(
        prompt=prompt,
        height=size[0],
        width=size[1],
        base=base,
        stages=filled,
        seed=int(torch.randint(2**31, ()))
        if seed is None
        else check_whole_number("seed", seed, "any will do", least=0),
        window=None,
        down_factor=None,
        weights=None if weights is None else os.fspath(weights),
        revision=revision,
        backend=backend,
        options=dict(options),
        image=None if image is None else fingerprint(image),
        model=describe(pipe),
    )


def fingerprint(image: Image.Image) -> dict[str, Any]:
    """What tells one image from another."""
    pixels = image.convert("RGB").tobytes()
    return {"sha256": hashlib.sha256(pixels).hexdigest(), "height": image.height, "width": image.width}


def _native(pipe: Any) -> int:
    return int(pipe.default_sample_size * pipe.vae_scale_factor)


def _check_not_small(size: sizes.Size, native: int) -> None:
    if max(size) < native:
        raise ValueError(
            f"{sizes.name(size)} is smaller than the model's own {native} px; call the pipeline itself, or give "
            "base=Base(height=..., width=...)"
        )


def _with_size(settings: Any, default: sizes.Size, token: int) -> Any:
    size = default if settings.height is None else sizes.rounded((settings.height, settings.width), token)
    return dataclasses.replace(settings, height=size[0], width=size[1])


def _with_defaults(base: Base, kind: Kind) -> Base:
    defaults = defaults_of(kind.from_text)
    return dataclasses.replace(
        base,
        steps=defaults["num_inference_steps"] if base.steps is None else base.steps,
        guidance=defaults["guidance_scale"] if base.guidance is None else base.guidance,
    )


def _check_image(image: Any, base: Base | None) -> sizes.Size:
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got a {type(image).__name__}; open it with PIL.Image.open")
    if base is not None:
        raise ValueError("base and image are both given, and only one can come first; leave one out")
    return image.height, image.width


def _stages(
    stages: Stage | Sequence[Stage], first: sizes.Size, last: sizes.Size, token: int, transformer: Any
) -> tuple[Stage, ...]:
    if isinstance(stages, Stage):
        if stages.height is not None:
            raise ValueError(f"stages={stages} has a size; give it in a list, or leave its height and width out")
        steps = sizes.between(first, last, token)
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


def _check_positions(transformer: Any, most: int | None, drawn: Sequence[sizes.Size], token: int) -> None:
    """Raises ValueError where a model has no positions for so many rows or columns."""
    for size in drawn:
        if most is not None and max(size) > most * token:
            raise ValueError(
                f"this {type(transformer).__name__} has positions for {most} x {most} tokens, "
                f"{sizes.name((most * token, most * token))}, and {sizes.name(size)} needs more; ask for a smaller "
                "picture, or take a FLUX.1, whose positions have no end"
            )


def _check_options(options: dict[str, Any], kind: Kind) -> None:
    common = defaults_of(kind.from_text).keys() & defaults_of(kind.from_image).keys()
    known = {name for name in common - OWN - ELSEWHERE.keys() if not any(part in name for part in TENSORS)}
    for name, value in options.items():
        if name in ELSEWHERE:
            raise TypeError(f"highres takes no {name}; see {ELSEWHERE[name]}")
        if name not in known:
            raise TypeError(
                f"highres got an unknown keyword {name!r}; what it hands on to the pipelines is "
                f"{', '.join(sorted(known))}"
            )
        try:
            json.dumps(value)
        except TypeError:
            raise TypeError(
                f"{name} must be plain data, so that the picture can be made again, got a {type(value).__name__}"
            ) from None


def _check_guided(options: dict[str, Any], kind: Kind, images: Sequence[Base | Stage]) -> None:
    """Raises ValueError where a negative prompt, or the guidance by it, would do nothing."""
    negative = [name for name, value in options.items() if name.startswith("negative_prompt") and value is not None]
    if kind.batched_guidance:
        if negative and all((each.guidance or 0) <= 1 for each in images):
            raise ValueError(f"{negative[0]} does nothing without guidance; let that of Base or Stage be above 1")
        return
    scale = options.get("true_cfg_scale", 1)
    check_number("true_cfg_scale", scale, 0, "4 is usual, 1 is off")
    if negative and scale <= 1:
        raise ValueError(
            f"{negative[0]} does nothing without true_cfg_scale above 1; give true_cfg_scale=4, say (it takes twice "
            "the time), or leave it out"
        )
    if scale > 1 and "negative_prompt" not in negative:
        raise ValueError(f"true_cfg_scale={scale} does nothing without negative_prompt; give one, '' for none")


def describe(pipe: Any) -> dict[str, Any]:
    """What a pipeline is, as plain data, as far as a picture depends on it and its weights do not say."""
    transformer, _ = find_transformer(pipe)
    name = str(getattr(pipe, "name_or_path", None) or "")
    schedule = json.loads(pipe.scheduler.to_json_string())
    return {
        "pipeline": type(pipe).__name__,
        # Of a folder its name alone: where it lies is nobody's business but the user's.
        "name": Path(name).name if Path(name).is_dir() else name,
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            "config": {name: value for name, value in schedule.items() if not name.startswith("_")},
        },
        "adapters": _active_adapters(pipe),
    }


def _active_adapters(pipe: Any) -> list[str]:
    try:
        return list(pipe.get_active_adapters())
    except (AttributeError, ValueError):  # a pipeline that takes none, or no peft
        return []
