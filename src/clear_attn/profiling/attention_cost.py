"""What a picture costs: the work of attention, counted exactly, dense and linearized, and memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from clear_attn.core.layout import Grid
from clear_attn.methods import Method
from clear_attn.methods.schedule import Schedule
from clear_attn.models import ModelAdapter
from clear_attn.patching.linearization import find_transformer, new_processors
from clear_attn.patching.resolve import check_goes_with, check_stands_in, config_beside, numbers_of
from clear_attn.patching.state import door_of, processors_of
from clear_attn.profiling.cost_report import Cost, OwnWindow, Place
from clear_attn.profiling.memory import memory_of
from clear_attn.utils.validation import ClearConfig, check_whole_number
from clear_attn.weights.metadata import config_of, mark_of, schedule_of_mark

DEFAULT_VAE_SCALE = 8


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
    """Counts one forward pass over one picture size: attention's work, and memory; no reference pictures.

    Args:
        pipe: a supported pipeline or transformer, linearized or not.
        height, width (`int`): of the picture in pixels; rounded down to whole tokens, as diffusers does.
        window, down_factor (`int`, *optional*): default to those of a linearized pipeline, else 16 and 1.
        method (`Method`, *optional*): defaults to that of a linearized pipeline, else CLEAR.
        schedule (`Schedule`, *optional*): defaults to that of a linearized pipeline, else none.
        text_tokens (`int`, *optional*): length of the text sequence; by default that of the family's pipelines, 512
            for FLUX and Chroma and, as the most it takes, Qwen-Image, 333 for SD3.
        batch (`int`, defaults to 1): pictures in one forward pass.

    Raises:
        TypeError: not a supported pipeline, a method that cannot stand in there, or a number that is not whole.
        ValueError: a size below one token, another number out of range, a method with a window, or a schedule of
            layers that are not there.

    Example:
        >>> from clear_attn import demo
        >>> round(cost(demo.pipeline(), 1024, 1024, window=8, text_tokens=24).ratio, 1)
        71.1
    """
    transformer, family = find_transformer(pipe)
    pixels = family.latents_per_token(transformer) * (getattr(pipe, "vae_scale_factor", None) or DEFAULT_VAE_SCALE)
    sides = []
    for name, side in (("height", height), ("width", width)):
        side = check_whole_number(name, side, "it is in pixels")
        if side < pixels:
            raise ValueError(f"{name}={side} is less than one token of {pixels} pixels; give the size in pixels")
        sides.append(side // pixels)
    text_tokens = family.default_text_tokens if text_tokens is None else text_tokens
    text_tokens = check_whole_number("text_tokens", text_tokens, "it is the length of the text sequence", least=0)
    batch = check_whole_number("batch", batch, "it is the number of pictures")
    door = door_of(transformer)
    mark = mark_of(transformer)
    own = door.config if door else config_of(mark) if mark else ClearConfig()
    config = config_beside(own, window, down_factor, method)
    if schedule is None:
        schedule = door.schedule if door else schedule_of_mark(mark) if mark else Schedule()
    counted = _count(transformer, family, (sides[0], sides[1]), text_tokens, batch, config, schedule)
    controlnet = getattr(pipe, "controlnet", None)
    nets = () if controlnet is None else getattr(controlnet, "nets", [controlnet])
    models = {name: part for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)}
    tokens = text_tokens + counted.image_tokens
    models = models or {"transformer": transformer}
    memory = memory_of(models, transformer, tokens, batch, height, width, family.activation_factor)
    return dataclasses.replace(
        counted, controlnets=tuple(_count_controlnet(net, counted) for net in nets), memory=memory
    )


def _count(
    transformer: Any,
    family: ModelAdapter,
    grid: Grid,
    text_tokens: int,
    batch: int,
    config: ClearConfig | Method,
    schedule: Schedule,
) -> Cost:
    layers = family.attention_layers(transformer)
    schedule.check_layers(layers, type(transformer).__name__)
    places: list[Place] = []
    if isinstance(config, Method):
        door = door_of(transformer)
        stock = door.original.processors if door else processors_of(layers)
        check_goes_with(config, schedule, "auto")
        check_stands_in(config, family, stock)
        new_processors(family, transformer, config, layers, stock)  # raises where its settings do not fit
        numbers = numbers_of(family, transformer, layers)
        local = [layer for layer in layers if schedule.window_of(layer) is None]
        places = [Place(numbers[layer], family.has_text(transformer, layer)) for layer in local]
    has_text = [family.has_text(transformer, layer) for layer in layers]
    own_windows = []
    for window, own_layers in schedule.own_windows(layers).items():
        with_text = sum(family.has_text(transformer, layer) for layer in own_layers)
        own_window = None if window == math.inf else int(window)
        own_windows.append(OwnWindow(own_window, with_text, len(own_layers) - with_text))
    clear = config if isinstance(config, ClearConfig) else ClearConfig()
    return Cost(
        height=grid[0],
        width=grid[1],
        text_tokens=text_tokens,
        batch=batch,
        layers=sum(has_text),
        inner_dim=transformer.config.num_attention_heads * transformer.config.attention_head_dim,
        window=clear.window,
        down_factor=clear.down_factor,
        layers_without_text=len(has_text) - sum(has_text),
        own_windows=tuple(own_windows),
        dense_above=schedule.dense_above,
        heads=transformer.config.num_attention_heads,
        method=None if isinstance(config, ClearConfig) else config,
        method_places=tuple(places),
    )


def _count_controlnet(controlnet: Any, beside: Cost) -> tuple[int, int]:
    """FLOPs of a ControlNet's attention for the same picture, dense and as it is."""
    net, family = find_transformer(controlnet)
    door, grid = door_of(net), (beside.height, beside.width)
    config, schedule = (door.config, door.schedule) if door else (ClearConfig(), Schedule())
    counted = _count(net, family, grid, beside.text_tokens, beside.batch, config, schedule)
    return counted.dense_step_flops, counted.step_flops if door else counted.dense_step_flops
