"""The diffusers pipelines that a cascade runs, made from the parts of the one that it is given."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusers import (
    FluxImg2ImgPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)


class Kind(NamedTuple):
    """The pipelines of a family.

    Attributes:
        from_text, from_image: text to image and image to image, of the same parts.
        batched_guidance: whether guidance runs two pictures in one forward pass.
    """

    from_text: type
    from_image: type
    batched_guidance: bool


KINDS = (
    Kind(FluxPipeline, FluxImg2ImgPipeline, False),
    Kind(StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, True),
)


def kind_of(pipe: Any) -> Kind:
    """The family of a pipeline.

    Raises:
        TypeError: it is none of a cascade's.
    """
    for kind in KINDS:
        if isinstance(pipe, (kind.from_text, kind.from_image)):
            return kind
    supported = ", ".join(each.__name__ for kind in KINDS for each in (kind.from_text, kind.from_image))
    raise TypeError(f"highres does not know a {type(pipe).__name__}; give one of: {supported}")


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
