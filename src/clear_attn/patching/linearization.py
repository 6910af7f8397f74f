"""The verbs of the library: linearize a pipeline in place, and undo it bit for bit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from clear_attn.backends import check_backend, flex
from clear_attn.methods import Method, as_text
from clear_attn.methods.schedule import Schedule
from clear_attn.models import ADAPTERS, ModelAdapter, adapter_for
from clear_attn.models.conflicts import check_hooks, check_parallelism, check_pipeline, check_processors
from clear_attn.models.processors import AttnProcessor
from clear_attn.patching.hooks import DoorIn
from clear_attn.patching.resolve import (
    check_goes_with,
    check_saves,
    check_stands_in,
    config_for,
    config_of_mark,
    lost,
    numbers_of,
)
from clear_attn.patching.state import State, apply, capture, door_of, original_state, processors_of, stand_beside
from clear_attn.utils.validation import ClearConfig
from clear_attn.weights.metadata import make_mark, mark_of, schedule_of_mark
from clear_attn.weights.parameters import (
    check_checkpoint,
    check_in_memory,
    check_replaceable,
    own_parameters,
    replaced_parameters,
)
from clear_attn.weights.sources import Checkpoint, load

PipelineOrTransformer = TypeVar("PipelineOrTransformer")


def find_transformer(pipe: Any) -> tuple[Any, ModelAdapter]:
    """The transformer of a pipeline, or the transformer given, with its family.

    Raises:
        TypeError: neither is supported.
    """
    candidate = getattr(pipe, "transformer", pipe)
    transformer = getattr(candidate, "_orig_mod", candidate)  # what torch.compile wraps
    family = adapter_for(transformer)
    if family is None:
        supported = ", ".join(family.transformer_class for family in ADAPTERS)
        given = " with a ".join(dict.fromkeys([type(pipe).__name__, type(transformer).__name__]))
        if hasattr(transformer, "nets"):
            raise TypeError(f"a {given} is not supported; give its ControlNets one by one: for net in controlnet.nets")
        raise TypeError(f"a {given} is not supported; give a diffusers pipeline or transformer of: {supported}")
    return transformer, family


def linearize(
    pipe: PipelineOrTransformer,
    window: int | None = None,
    down_factor: int | None = None,
    *,
    method: Method | None = None,
    schedule: Schedule | None = None,
    weights: str | os.PathLike[str] | None = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    backend: str = "auto",
    keep_original: bool = True,
) -> PipelineOrTransformer:
    """Makes the image attention of a pipeline's transformer local, in place.

    All is checked before anything is changed; on any error the pipeline is as it was. On a linearized pipeline
    it starts from the restored one, and what is split over ranks stays so.

    Args:
        pipe: a diffusers pipeline or transformer, FLUX.1, FLUX.2, Qwen-Image, Chroma, Stable Diffusion 3 or
            3.5, DiT, or a variant of them.
        window (`int`, *optional*, defaults to what the weights were distilled for, else 16): radius in tokens of
            the disc of image keys that an image query sees. A token is 16 x 16 pixels.
        down_factor (`int`, *optional*, defaults to what the weights were distilled for, else 1): side in tokens
            of the cells whose pooled keys every image query sees too; 1 means none.
        method (`Method`, *optional*, defaults to what the weights were distilled for, else CLEAR): another way to
            attend, of `clear_attn.methods`; in place of window and down_factor, and of no use without distillation.
        schedule (`Schedule`, *optional*, defaults to what was saved with the weights, else none): steps and layers that
            stay dense, and layers with a window of their own.
        weights (`str` or path, *optional*, defaults to `"auto"`): distilled weights. `"auto"` fetches those
            published for FLUX.1-dev and window and down_factor, or puts a pipeline that was saved whole while
            linearized back to work. None keeps the model's own (training-free). Or a `.safetensors` file, a
            directory that `save_pretrained` wrote, or a Hub id, `owner/repo` or `owner/repo/file.safetensors`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): of the Hub; by default that of `hf auth login`.
        backend (`str`, defaults to `"auto"`): `"flex"`, `"tiled"`, `"dense"`, or what fits each call best.
        keep_original (`bool`, defaults to `True`): keep the weights that are replaced, on the CPU, so that
            `restore` can put them back.

    Returns:
        ``pipe`` itself.

    Raises:
        TypeError: not a supported pipeline; window or down_factor not a whole number; method or schedule none; weights
            no path or name.
        ValueError: window or down_factor below 1; one of these or a method other than what the weights were distilled
            for; a window, a backend or layers with own windows for another method than CLEAR; a schedule that names
            layers which are not there; unknown backend; weights that do not fit, or that are not published; a
            pipeline saved whole that cannot be put back to work without its weights.
        FileNotFoundError, PermissionError, ConnectionError: no weights there, or no way to them.
        RuntimeError: `backend="flex"` on a machine where it cannot run; attention processors of another
            library; guidance that reaches into attention; context parallelism; parameters on the meta device; weights
            for a model that is quantized or has a LoRA fused in; a linearized pipeline whose original weights were
            given up.

    Example:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = clear.linearize(demo.pipeline(), weights=demo.distilled())
        >>> clear.cost(pipe, 128, 128).window
        8
        >>> clear.is_linearized(clear.restore(pipe))
        False
    """
    transformer, family = find_transformer(pipe)
    check_pipeline(pipe)
    wanted = config_for(window, down_factor, method, None)
    check_backend(backend)
    _check_backend_can_run(backend)
    layers = family.attention_layers(transformer)
    _check_schedule(schedule, layers, family, type(transformer).__name__)
    check_in_memory(transformer, layers)
    stock = original_state(transformer, layers)
    check_processors(stock.processors, family)
    check_parallelism(processors_of(layers))
    check_hooks(layers)
    carried = (stock.mark["weights"], stock.mark["source"]) if stock.mark else (None, None)
    armed_again = weights == "auto" and stock.mark is not None
    if stock.mark and armed_again:
        wanted = config_of_mark(window, down_factor, method, stock.mark)
        schedule = schedule_of_mark(stock.mark) if schedule is None else schedule
        weights = None
    if weights is not None:
        check_replaceable(layers)
    source = None if weights is None else load(weights, pipe, transformer, wanted, revision, token)
    config = config_for(window, down_factor, method, source) if source else wanted
    if schedule is None:
        schedule = source.schedule if source else Schedule()
    checkpoint = source.values if source else {}
    if isinstance(config, Method):
        check_goes_with(config, schedule, backend)
        check_stands_in(config, family, stock.processors)
    processors = new_processors(family, transformer, config, layers, stock.processors)
    for layer, processor in processors.items():
        processor.own_window = schedule.window_of(layer)
    own = own_parameters(processors)
    if stock.mark and armed_again and own:
        raise lost(stock.mark)
    if source:
        _check_fits(source, {**replaced_parameters(layers), **own}, type(transformer).__name__)
        schedule.check_layers(layers, type(transformer).__name__)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(checkpoint[name])
    for layer, attn in layers.items():
        stand_beside(processors[layer], attn)
    values = {name: value for name, value in checkpoint.items() if name not in own}
    before = capture(transformer, layers, values.keys() | stock.values.keys())
    kept = {name: stock.values.get(name, before.values[name]) for name in values} if keep_original else {}
    given_up = bool(values) and not keep_original
    spread = before.door.spread if before.door else None
    if spread and isinstance(config, Method):
        raise ValueError(
            f"{config} is not split over ranks, as this pipeline is; call clear_attn.deparallelize() first"
        )
    door = DoorIn(family, config, schedule, backend, stock._replace(values=kept), given_up, spread)
    mark = make_mark(transformer, config, schedule, *((source.name, source.source) if source else carried))
    try:
        apply(transformer, layers, State(door, processors, {**stock.values, **values}, mark))
    except BaseException:
        apply(transformer, layers, before)
        raise
    return pipe


def restore(pipe: PipelineOrTransformer) -> PipelineOrTransformer:
    """Undoes `linearize`, bit for bit: parameters, processors, hooks. A pipeline that is not linearized stays so.

    What was changed since then by others stays: other hooks, LoRAs, the attention backend.

    Warns of a pipeline that was saved whole while it was linearized and runs dense since it was loaded.

    Raises:
        TypeError: not a supported pipeline.
        RuntimeError: the original weights were given up with `keep_original=False`, or cannot be put back:
            parameters on the meta device, a LoRA fused in.
    """
    transformer, family = find_transformer(pipe)
    _warn_if_left_dense(transformer)
    if door_of(transformer):
        apply(transformer, family.attention_layers(transformer), restored_state(pipe))
    return pipe


def restored_state(pipe: Any) -> State:
    """What `restore` puts in place; errors as there."""
    transformer, family = find_transformer(pipe)
    original = original_state(transformer, family.attention_layers(transformer))
    if door_of(transformer) and original.mark and original.mark["weights"]:
        raise RuntimeError(
            f"this pipeline was loaded with distilled weights in it ({original.mark['weights']}), saved whole "
            "while it was linearized; for the original load the original pipeline"
        )
    return original


def is_linearized(pipe: Any) -> bool:
    """Whether a pipeline's transformer has been linearized.

    Warns of a pipeline that was saved whole while it was linearized and runs dense since it was loaded.

    Raises:
        TypeError: not a supported pipeline.
    """
    transformer, _ = find_transformer(pipe)
    _warn_if_left_dense(transformer)
    return door_of(transformer) is not None


def _warn_if_left_dense(transformer: Any) -> None:
    mark = mark_of(transformer)
    if mark and not door_of(transformer):
        method = mark.get("method")  # which need not be known here
        settings = f"method={as_text(method)}" if method else f"window={mark['window']}"
        warnings.warn(
            f"this pipeline was saved while it was linearized ({settings}, weights {mark['weights']}), "
            "and now runs with dense attention; call clear_attn.linearize(pipe)",
            stacklevel=3,
        )


def _check_schedule(schedule: Schedule | None, layers: Mapping[str, Any], family: ModelAdapter, model: str) -> None:
    if schedule is None:
        return
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a clear_attn.Schedule, got {schedule!r} of type {type(schedule).__name__}")
    if schedule.dense_above is not None and not family.timestep_is_sigma:
        raise ValueError(
            f"dense_above={schedule.dense_above} is a share of noise, which a call of a {model} does not tell; name "
            "layers in dense_layers or windows, or leave the schedule out"
        )
    schedule.check_layers(layers, model)


def _check_fits(source: Checkpoint, parameters: Mapping[str, nn.Parameter], model: str) -> None:
    """Raises ValueError where weights are not for this kind of model."""
    if source.architecture not in (None, model):
        raise ValueError(
            f"{source.name} was distilled for a {source.architecture}, and this is a {model}; give weights distilled "
            "for this model, or weights=None"
        )
    check_checkpoint(source.values, parameters, model)


def _check_backend_can_run(backend: str) -> None:
    """Pipelines move between devices, so only what no device of this machine can run is refused here."""
    if backend != "flex":
        return
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    obstacles = {device: flex.reason_against_device(torch.device(device)) for device in devices}
    if all(obstacles.values()):
        raise RuntimeError(f"backend='flex' cannot run on this machine: {obstacles}; use backend='auto' or 'tiled'")


def new_processors(
    family: ModelAdapter,
    transformer: Any,
    config: ClearConfig | Method,
    layers: Mapping[str, Any],
    stock: Mapping[str, Any],
) -> dict[str, AttnProcessor]:
    """By layer, with new parameters on the CPU.

    Raises:
        ValueError: a method's settings do not fit a layer.
        TypeError: a method's processor holds what would not be saved.
    """
    processors: dict[str, AttnProcessor] = {}
    numbers = numbers_of(family, transformer, layers)
    # Whatever mode the caller is in, the parameters must serve training too, and their values are set here.
    with torch.inference_mode(False), torch.device("cpu"):
        for layer, attn in layers.items():
            if isinstance(config, Method):
                processor: AttnProcessor = config.processor(attn, layer, numbers[layer])
                check_saves(processor)
            else:
                processor = family.stand_in(stock[layer], config.down_factor, layer)
            processor.fused_qkv_reliable = family.fused_qkv_reliable
            processors[layer] = processor
    return processors
