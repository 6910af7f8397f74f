"""`cost`: FLOPs of attention and memory of one forward pass, and FLOPs of a run of a scheduler."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from clear_attn.core.coordinates import Grid
from clear_attn.methods import Clear, Layer, Method
from clear_attn.methods.schedule import Schedule, check_sigma
from clear_attn.models import ModelAdapter, adapter_for
from clear_attn.models.pipeline_defaults import longest_text, pixels_per_token, sigmas_of_run
from clear_attn.patching.description import controlnets_of
from clear_attn.patching.resolve import override_method
from clear_attn.patching.target import entry_hook_of, find_transformer
from clear_attn.profiling.cost_report import Cost, LayerGroup, Phase
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
    steps: int | None = None,
    sigmas: Iterable[float] | None = None,
) -> Cost:
    """Count the FLOPs of attention and the memory of one forward pass, without reference images.

    With `steps` or `sigmas`, count the FLOPs of a run too, where a schedule makes steps differ.

    Args:
        pipe: a supported pipeline or transformer, linearized or not.
        height, width (`int`): the size of the image in pixels; rounded down to whole tokens, with a warning.
        window, down_factor (`int`, *optional*): default to those of a linearized pipeline, else 16 and 1.
        method (`Method`, *optional*): defaults to that of a linearized pipeline, else CLEAR.
        schedule (`Schedule`, *optional*): defaults to that of a linearized pipeline, else none.
        text_tokens (`int`, *optional*): length of the text sequence. Defaults to that of the model's pipelines: 512
            for FLUX, Chroma, Krea 2, Qwen-Image 2.1, and Qwen-Image and Z-Image (their maximum), 333 for SD3, 80 for
            FLUX.3; or what the tokenizer takes if less.
        batch (`int`, defaults to 1): images in one forward pass.
        steps (`int`, *optional*): the number of steps of a run. Their sigmas are those that the pipeline gives its
            scheduler at this size, its dynamic shift included. A step is one forward pass; guidance that needs two is
            `batch=2`.
        sigmas (numbers from 0 to 1, *optional*): the sigma of each forward pass of a run, in place of `steps`. Such as
            `pipe.scheduler.sigmas[:-1]` after a run.

    Returns:
        `Cost`: FLOPs and bytes; `print` shows a table.

    Raises:
        TypeError: the pipeline or the method is not supported; a number is not whole.
        ValueError: a size is below one token; another number is out of range; both a method and a window are given;
            the schedule names layers that do not exist; the sigmas of a run are not known, or given twice.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> round(cost(demo.pipeline(), 1024, 1024, window=8).ratio, 1)
        66.6
        >>> schedule = clear.Schedule(windows_by_sigma=((0.9, 32), (0.6, 16)))
        >>> counted = cost(demo.pipeline(), 1024, 1024, window=8, schedule=schedule, steps=28)
        >>> [phase.method.window for phase in counted.run], counted.steps
        ([32, 16, 8], 28)
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
    run = _sigmas(pipe, adapter, grid, steps, sigmas)
    counted = _count(transformer, adapter, grid, text_tokens, batch, method, schedule, run)
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


def _sigmas(
    pipe: Any, adapter: ModelAdapter, grid: Grid, steps: int | None, sigmas: Iterable[float] | None
) -> list[float]:
    """Return the sigmas of a run, none if nothing was asked."""
    if steps is not None and sigmas is not None:
        raise ValueError(f"steps={steps} and sigmas are both given; leave one out")
    if steps is not None:
        steps = check_whole_number("steps", steps, "it is the number of steps of a run")
        return sigmas_of_run(pipe, adapter, grid[0] * grid[1], steps)
    given = [] if sigmas is None else [check_sigma("a sigma of sigmas", float(sigma)) for sigma in sigmas]
    if sigmas is not None and not given:
        raise ValueError("sigmas is empty; give the sigma of each step of a run, or leave it out")
    return given


def _count(
    transformer: Any,
    adapter: ModelAdapter,
    grid: Grid,
    text: int,
    batch: int,
    method: Method,
    schedule: Schedule,
    sigmas: Iterable[float] = (),
) -> Cost:
    layers = list(adapter.describe_layers(transformer).values())
    schedule.validate_layers([layer.name for layer in layers], type(transformer).__name__)
    for layer in layers:
        method.parameters_for(layer)  # raises if its settings do not fit

    def groups_at(sigma: float | None) -> tuple[LayerGroup, ...]:
        counts = Counter(
            (schedule.method_for(method, layer, sigma), layer.has_text, schedule.names(layer.name) is not None)
            for layer in layers
            if layer.has_image
        )
        return tuple(LayerGroup(own, has_text, number, named) for (own, has_text, named), number in counts.items())

    phases: dict[Method, list[float]] = defaultdict(list)
    for sigma in sigmas:
        # In the precision of a timestep, as in a call.
        phases[schedule.method_for(method, Layer(""), schedule.sigma_of(torch.tensor([sigma])))].append(sigma)
    run = tuple(
        Phase(own, tuple(each), groups_at(schedule.sigma_of(torch.tensor(each[:1])))) for own, each in phases.items()
    )
    for level in schedule.levels:
        groups_at(level)  # raises if the method has no windows
    text, padding = adapter.padded(grid, text)
    return Cost(
        *grid,
        text,
        batch,
        layers[0].heads,
        layers[0].head_dim,
        method,
        groups_at(None),
        schedule.dense_above_sigma,
        padding_tokens=padding,
        windows_by_sigma=schedule.windows_by_sigma,
        run=run,
        text_attends_to_image=adapter.text_queries,
    )


def _count_controlnet(controlnet: Any, counted: Cost) -> tuple[int, int]:
    """Return the FLOPs of a ControlNet's attention for the same image: dense, and as it is."""
    net, adapter = find_transformer(controlnet)
    grid = counted.height, counted.width
    own = _count(net, adapter, grid, counted.text_tokens, counted.batch, *_settings_of(net))
    return own.dense_step_flops, own.step_flops if entry_hook_of(net) else own.dense_step_flops
