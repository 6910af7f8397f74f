"""The diffusers pipelines that a cascade runs, made from the parts of the one that it is given."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import diffusers

from clear_attn.cascade.stages import check_number
from clear_attn.models import ADAPTERS
from clear_attn.models.class_names import is_instance
from clear_attn.patching.target import entry_hook_of, find_transformer


class Kind(NamedTuple):
    """The pipeline classes of a model, see `HighresPipelines`."""

    from_text: type
    from_image: type
    batched_guidance: bool

    def batch(self, guidance: float | None) -> int:
        """Return how many images one forward pass computes at a guidance scale."""
        return 2 if self.batched_guidance and (guidance or 0) > 1 else 1


# Keywords of the pipelines' calls that a plan says in other words, and where.
ELSEWHERE = {
    "num_inference_steps": "steps of Base and Stage",
    "guidance_scale": "guidance of Base and Stage",
    "strength": "strength of Stage",
    "generator": "seed",
    "sigmas": "shift and steps of Stage",
    "mu": "shift of Stage",
    "latents": "seed, or image",
    "num_images_per_prompt": "one call for each image",
    "output_type": "the result's images",
    "return_dict": "the result",
}
# What highres names itself, and what is no plain data.
OWN = {"self", "prompt", "height", "width", "image", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
TENSORS = ("embeds", "ip_adapter_image")


def kind_of(pipe: Any) -> Kind:
    """Return the classes that draw a pipeline's stages.

    Raises:
        TypeError: `highres` does not support the pipeline.
    """
    supported = [adapter.highres_pipelines for adapter in ADAPTERS if adapter.highres_pipelines is not None]
    for text_to_image, image_to_image, batched_guidance in supported:
        if is_instance(pipe, (text_to_image, image_to_image)):
            return Kind(getattr(diffusers, text_to_image), getattr(diffusers, image_to_image), batched_guidance)
    names = ", ".join(name for each in supported for name in (each.text_to_image, each.image_to_image))
    raise TypeError(f"highres does not know a {type(pipe).__name__}; give one of: {names}")


def defaults_of(pipeline: type) -> dict[str, Any]:
    """The keywords of a pipeline's call and their defaults."""
    return {each.name: each.default for each in inspect.signature(pipeline.__call__).parameters.values()}


def static_schedule(scheduler: Any, shift: float | None) -> Any:
    """A scheduler of the same kind with a static shift; with None, a copy."""
    changes = {} if shift is None else {"use_dynamic_shifting": False, "shift": shift}
    return type(scheduler).from_config(scheduler.config, **changes)


def check_schedule(scheduler: Any, shift: float | None) -> None:
    """Raises ValueError where a scheduler knows no static shift."""
    if shift is not None and "shift" not in scheduler.config:
        raise ValueError(
            f"a {type(scheduler).__name__} has no static shift; set shift=None in each Stage, or give the pipeline a "
            "FlowMatchEulerDiscreteScheduler"
        )


def check_options(options: dict[str, Any], kind: Kind) -> None:
    """Raise TypeError for a keyword that not both pipelines take, or a value that is no plain data."""
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
                f"{name} must be plain data, so that the image can be drawn again, got a {type(value).__name__}"
            ) from None


def check_guidance(options: dict[str, Any], kind: Kind, scales: Sequence[float | None]) -> None:
    """Raise ValueError where a negative prompt, or the guidance by it, would do nothing."""
    negative = [name for name, value in options.items() if name.startswith("negative_prompt") and value is not None]
    if kind.batched_guidance:
        if negative and all(kind.batch(scale) == 1 for scale in scales):
            raise ValueError(f"{negative[0]} does nothing without guidance; let that of Base or Stage be above 1")
        return
    true_scale = options.get("true_cfg_scale", 1)
    check_number("true_cfg_scale", true_scale, 0, "4 is usual, 1 is off")
    if negative and true_scale <= 1:
        raise ValueError(
            f"{negative[0]} does nothing without true_cfg_scale above 1; give true_cfg_scale=4, say (it takes twice "
            "the time), or leave it out"
        )
    if true_scale > 1 and "negative_prompt" not in negative:
        raise ValueError(f"true_cfg_scale={true_scale} does nothing without negative_prompt; give one, '' for none")


def ranks_of(pipe: Any) -> int:
    """Return how many processes an image is split over."""
    hook = entry_hook_of(find_transformer(pipe)[0])
    return hook.sharder.ranks if hook and hook.sharder else 1


@contextlib.contextmanager
def tiled_vae(vae: Any) -> Iterator[None]:
    """Encode and decode images larger than the autoencoder's tile tile by tile, for the length of a `with` block."""
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
