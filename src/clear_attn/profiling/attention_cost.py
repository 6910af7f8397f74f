"""`cost`: FLOPs of attention and memory of one forward pass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from clear_attn.core.coordinates import Grid
from clear_attn.methods import Clear, Method
from clear_attn.methods.schedule import Schedule
from clear_attn.models import ModelAdapter, adapter_for
from clear_attn.models.pipeline_defaults import longest_text, pixels_per_token
from clear_attn.patching.description import controlnets_of
from clear_attn.patching.resolve import override_method
from clear_attn.patching.target import entry_hook_of, find_transformer
from clear_attn.profiling.cost_report import Cost, LayerGroup
from clear_attn.profiling.memory import (
    Memory,
    activation_bytes,
    decode_bytes,
    models_of,
    tiled_decode_bytes,
    weight_bytes,
)
from clear_attn.utils._torch import unwrap_compiled
from clear_attn.utils.image_sizes import round_down
from clear_attn.utils.validation import check_whole_number
from clear_attn.weights.metadata import metadata_of, read_method, read_schedule


def cost(
    pipe: Any,
    height: int,
    width: int,
    *,
    window: int | None = None,
    down_factor: int | None = None,
    method: Method | None = None,
    schedule: Schedule | None = None,
    text_tokens: int | None = None,
    batch: int = 1,
) -> Cost:
    """Count the FLOPs of attention and the memory of one forward pass, without reference images.

    Args:
        pipe: a supported pipeline or transformer, linearized or not.
        height, width (`int`): the size of the image in pixels; rounded down to whole tokens, with a warning.
        window, down_factor (`int`, *optional*): default to those of a linearized pipeline, else 16 and 1.
        method (`Method`, *optional*): defaults to that of a linearized pipeline, else CLEAR.
        schedule (`Schedule`, *optional*): defaults to that of a linearized pipeline, else none.
        text_tokens (`int`, *optional*): length of the text sequence. Defaults to that of the model's pipelines: 512
            for FLUX, Chroma, Krea 2, and Qwen-Image and Z-Image (their maximum), 333 for SD3, 80 for FLUX.3; or what
            the tokenizer takes if less.
        batch (`int`, defaults to 1): images in one forward pass.

    Returns:
        `Cost`: FLOPs and bytes; `print` shows a table.

    Raises:
        TypeError: the pipeline or the method is not supported; a number is not whole.
        ValueError: a size is below one token; another number is out of range; both a method and a window are given;
            the schedule names layers that do not exist.

    Examples:
        >>> from clear_attn import demo
        >>> round(cost(demo.pipeline(), 1024, 1024, window=8).ratio, 1)
        71.1
    """
    transformer, adapter = find_transformer(pipe)
    pixels = pixels_per_token(pipe, transformer, adapter)
    size = [check_whole_number(name, side, "it is in pixels") for name, side in (("height", height), ("width", width))]
    height, width = round_down((size[0], size[1]), pixels, stacklevel=2)
    text_tokens = min(adapter.default_text_tokens, longest_text(pipe)) if text_tokens is None else text_tokens
    text_tokens = check_whole_number("text_tokens", text_tokens, "it is the length of the text sequence", least=0)
    batch = check_whole_number("batch", batch, "it is the number of images")
    own_method, own_schedule = _settings_of(transformer)
    method = override_method(own_method, window, down_factor, method)
    grid, schedule = (height // pixels, width // pixels), own_schedule if schedule is None else schedule
    counted = _count(transformer, adapter, grid, text_tokens, batch, method, schedule)
    controlnets = controlnets_of(pipe)
    known = [net for net in controlnets if adapter_for(unwrap_compiled(net))]
    tokens = counted.text_tokens + counted.padding_tokens + counted.image_tokens
    elements = batch * tokens * counted.heads * counted.head_dim
    models = models_of(pipe) or {"transformer": transformer}
    return dataclasses.replace(
        counted,
        controlnets=tuple(_count_controlnet(net, counted) for net in known),
        uncounted_controlnets=len(controlnets) - len(known),
        memory=Memory(
            {name: weight_bytes(model) for name, model in models.items()},
            activation_bytes(transformer, elements, adapter.activation_factor),
            decode_bytes(models.get("vae"), height, width),
            tiled_decode_bytes(models.get("vae"), height, width),
        ),
    )


def _settings_of(transformer: Any) -> tuple[Method, Schedule]:
    """Return the method and schedule of a linearized model, or of one that was saved linearized; else the defaults."""
    if hook := entry_hook_of(transformer):
        return hook.method, hook.schedule
    if metadata := metadata_of(transformer):
        return read_method(metadata), read_schedule(metadata)
    return Clear(), Schedule()


def _count(
    transformer: Any, adapter: ModelAdapter, grid: Grid, text: int, batch: int, method: Method, schedule: Schedule
) -> Cost:
    layers = list(adapter.describe_layers(transformer).values())
    schedule.validate_layers([layer.name for layer in layers], type(transformer).__name__)
    for layer in layers:
        method.parameters_for(layer)  # raises if its settings do not fit
    counts = Counter(
        (schedule.method_for(method, layer), layer.has_text, schedule.names(layer.name) is not None)
        for layer in layers
        if layer.has_image
    )
    groups = tuple(LayerGroup(own, has_text, number, named) for (own, has_text, named), number in counts.items())
    text, padding = adapter.padded(grid, text)
    above = schedule.dense_above_sigma
    return Cost(*grid, text, batch, layers[0].heads, layers[0].head_dim, method, groups, above, padding_tokens=padding)


def _count_controlnet(controlnet: Any, counted: Cost) -> tuple[int, int]:
    """Return the FLOPs of a ControlNet's attention for the same image: dense, and as it is."""
    net, adapter = find_transformer(controlnet)
    grid = counted.height, counted.width
    own = _count(net, adapter, grid, counted.text_tokens, counted.batch, *_settings_of(net))
    return own.dense_step_flops, own.step_flops if entry_hook_of(net) else own.dense_step_flops
