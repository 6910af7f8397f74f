"""The diffusers pipelines that draw a cascade, made from the components of the one that is given."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from clear_attn.cascade.stages import validate_number
from clear_attn.models import ADAPTERS, HighresPipelines, ModelAdapter
from clear_attn.models.image_to_image import ForwardPasses
from clear_attn.models.loading import with_components_of
from clear_attn.models.pipeline_defaults import default_text_tokens, native_side, pixels_per_token
from clear_attn.patching.hooks import EntryHook
from clear_attn.patching.target import Target, find_target, find_transformer
from clear_attn.utils.validation import check_whole_number

# Keywords of the pipelines' calls that `highres` sets itself, and the argument to give instead.
REPLACED = {
    "num_inference_steps": "steps of Base and Stage",
    "strength": "strength of Stage",
    "generator": "seed",
    "sigmas": "shift and steps of Stage",
    "mu": "shift of Stage",
    "latents": "seed, or image",
    "num_images_per_prompt": "one call for each image",
    "output_type": "the result's images",
    "return_dict": "the result",
}
# Keywords that are arguments of `highres` too, and parts of the names of those that take tensors.
OWN = {"self", "prompt", "height", "width", "image", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
TENSORS = ("embeds", "ip_adapter_image")


class CascadeTarget(NamedTuple):
    """A pipeline that `highres` draws with.

    Attributes:
        patched: the pipeline, its transformer and adapter.
        pipelines: knows how the model's pipelines are called.
        text_to_image, image_to_image: classes of the pipelines that draw the base image and the stages.
    """

    patched: Target
    pipelines: HighresPipelines
    text_to_image: Any
    image_to_image: Any

    @property
    def pipe(self) -> Any:
        return self.patched.pipe

    @property
    def transformer(self) -> Any:
        return self.patched.transformer

    @property
    def adapter(self) -> ModelAdapter:
        return self.patched.adapter

    @property
    def hook(self) -> EntryHook | None:
        """The entry hook, if the pipeline is linearized."""
        return self.patched.hook

    @property
    def token(self) -> int:
        """The side of a token in pixels."""
        return pixels_per_token(self.pipe, self.transformer, self.adapter)

    @property
    def native_side(self) -> int:
        """The longer side in pixels of the images that the model was trained on."""
        if not hasattr(self.pipe, "default_sample_size"):
            return self.pipelines.native_side
        return native_side(self.pipe, self.transformer)

    @property
    def own_options(self) -> dict[str, int]:
        """The text length, if the model takes less text than its pipelines pad to by default."""
        tokens, usual = default_text_tokens(self.pipe), call_defaults(self.text_to_image)["max_sequence_length"]
        return {"max_sequence_length": tokens} if tokens is not None and tokens < usual else {}

    @property
    def ranks(self) -> int:
        """The number of processes that share an image."""
        return self.hook.sharder.ranks if self.hook and self.hook.sharder else 1

    def passes(self, guidance: float | None, options: Mapping[str, Any]) -> ForwardPasses:
        """Return the forward passes of a step at a guidance scale, with further keywords of the pipelines' calls."""
        return self.pipelines.passes(self.pipe, guidance, options)


def find_cascade_target(pipe: Any) -> CascadeTarget:
    """Return what `highres` needs of a pipeline. A modular one's components are drawn with in an ordinary one.

    Raises:
        TypeError: `highres` does not support the pipeline.
        RuntimeError: components of a modular pipeline are not loaded.
    """
    supported = [each for adapter in ADAPTERS for each in adapter.highres_pipelines]
    for each in supported:
        if each.takes(pipe):
            classes = each.classes()
            if each.is_modular(pipe):
                find_transformer(pipe)  # raises if it is not loaded
                pipe = with_components_of(pipe, classes[0])
            return CascadeTarget(find_target(pipe), each, *classes)
    names = dict.fromkeys(name for each in supported for name in each.supported)
    raise TypeError(f"highres does not support a {type(pipe).__name__}; give one of: {', '.join(names)}")


def pipeline_of(cls: Any, pipe: Any, scheduler: Any) -> Any:
    """Return a pipeline of a class with the components and settings of another, and a scheduler of its own."""
    names = inspect.signature(cls).parameters.keys() & pipe.config.keys() - pipe.components.keys()
    return cls(**{name: pipe.config[name] for name in names}, **{**pipe.components, "scheduler": scheduler})


def call_defaults(pipeline: Any) -> dict[str, Any]:
    """Return the keywords of a pipeline's call with their defaults."""
    return {each.name: each.default for each in inspect.signature(pipeline.__call__).parameters.values()}


def static_schedule(scheduler: Any, shift: float | None) -> Any:
    """Return a scheduler of the same class with a static shift; with None, a copy."""
    changes = {} if shift is None else {"use_dynamic_shifting": False, "shift": shift}
    return type(scheduler).from_config(scheduler.config, **changes)


def validate_shift(scheduler: Any, shift: float | None) -> None:
    """Raise ValueError if a scheduler has no static shift."""
    if shift is not None and "shift" not in scheduler.config:
        raise ValueError(
            f"a {type(scheduler).__name__} has no static shift; set shift=None in each Stage, or give the pipeline a "
            "FlowMatchEulerDiscreteScheduler"
        )


def validate_options(target: CascadeTarget, options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for a keyword that not both pipelines take, or a value that they refuse."""
    common = call_defaults(target.text_to_image).keys() & call_defaults(target.image_to_image).keys()
    replaced = {**REPLACED, target.pipelines.guidance: "guidance of Base and Stage"}
    known = {name for name in common - OWN - replaced.keys() if not any(part in name for part in TENSORS)}
    for name, value in options.items():
        if name in replaced:
            raise TypeError(f"highres takes no {name}; see {replaced[name]}")
        if name not in known:
            raise TypeError(
                f"highres got an unknown keyword {name!r}; the keywords that it passes on to the pipelines are "
                f"{', '.join(sorted(known))}"
            )
        try:
            json.dumps(value)
        except TypeError:
            raise TypeError(
                f"{name} must be plain data, so that the image can be drawn again, got a {type(value).__name__}"
            ) from None
    if options.get("max_sequence_length") is not None:
        check_whole_number("max_sequence_length", options["max_sequence_length"], "it is a number of text tokens")


def validate_inputs(pipeline: Any, pipe: Any, given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that the check of a diffusers pipeline refuses.

    Args:
        pipeline: a class of pipelines.
        pipe: the pipeline that has its components.
        given: arguments of a call.
    """
    if not hasattr(pipeline, "check_inputs"):
        return
    parameters = inspect.signature(pipeline.check_inputs).parameters
    optional = {name: None for name, each in parameters.items() if each.default is each.empty and name != "self"}
    known = {name: value for name, value in given.items() if name in parameters}
    try:
        pipeline.check_inputs(pipe, **{**optional, **known})
    except ValueError as error:
        raise ValueError(str(error)) from error


def validate_guidance(target: CascadeTarget, options: Mapping[str, Any], scales: Sequence[float | None]) -> None:
    """Raise ValueError for a negative prompt, or a scale of its guidance, that would have no effect."""
    negative = [name for name, value in options.items() if name.startswith("negative_prompt") and value is not None]
    if "true_cfg_scale" not in call_defaults(target.text_to_image).keys() - {target.pipelines.guidance}:
        most = target.pipelines.unguided
        if negative and all((scale or 0) <= most for scale in scales):
            raise ValueError(
                f"{negative[0]} has no effect without guidance; give Base or Stage a guidance above {most:g}, or leave "
                "it out"
            )
        return
    true_scale = options.get("true_cfg_scale", 1)
    validate_number("true_cfg_scale", true_scale, 0, "4 is usual, 1 is off")
    if negative and true_scale <= 1:
        raise ValueError(
            f"{negative[0]} has no effect without true_cfg_scale above 1; give true_cfg_scale=4, for example (it takes "
            "twice the time), or leave it out"
        )
    if true_scale > 1 and "negative_prompt" not in negative:
        raise ValueError(f"true_cfg_scale={true_scale} has no effect without negative_prompt; give one, '' for none")
