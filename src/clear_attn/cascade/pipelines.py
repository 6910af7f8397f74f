"""The diffusers pipelines that a cascade runs, made from the parts of the one that it is given."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import diffusers

from clear_attn.models import ADAPTERS
from clear_attn.models.class_names import is_instance


class Kind(NamedTuple):
    """The pipeline classes of a model, see `HighresPipelines`."""

    from_text: type
    from_image: type
    batched_guidance: bool


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


@contextlib.contextmanager
def tiled_vae(vae: Any) -> Iterator[None]:
    """Pictures larger than the autoencoder's tile are encoded and decoded tile by tile; then as it was."""
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
