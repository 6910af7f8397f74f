"""The verbs of the library: linearize a pipeline in place, and undo it bit for bit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clear_attn.backends import check_backend, flex
from clear_attn.config import ClearConfig
from clear_attn.doors import DoorIn
from clear_attn.families import FAMILIES, Family, family_of
from clear_attn.state import State, apply, capture, door_of, original_state, processors_of, stand_beside
from clear_attn.weights import (
    POOLED,
    check_checkpoint,
    check_in_memory,
    check_replaceable,
    pooled_factor,
    read_checkpoint,
)

PipelineOrTransformer = TypeVar("PipelineOrTransformer")


def find_transformer(pipe: Any) -> tuple[Any, Family]:
    """The transformer of a pipeline, or the transformer given, with its family.

    Raises:
        TypeError: neither is supported.
    """
    candidate = getattr(pipe, "transformer", pipe)
    transformer = getattr(candidate, "_orig_mod", candidate)  # what torch.compile wraps
    family = family_of(transformer)
    if family is None:
        supported = ", ".join(family.transformer_class.__name__ for family in FAMILIES)
        given = " with a ".join(dict.fromkeys([type(pipe).__name__, type(transformer).__name__]))
        raise TypeError(f"a {given} is not supported; give a diffusers pipeline or transformer of: {supported}")
    return transformer, family


def linearize(
    pipe: PipelineOrTransformer,
    window: int | None = None,
    down_factor: int | None = None,
    *,
    weights: str | os.PathLike[str] | None = "auto",
    backend: str = "auto",
    keep_original: bool = True,
) -> PipelineOrTransformer:
    """Makes the image attention of a pipeline's transformer local, in place.

    All is checked before anything is changed; on any error the pipeline is as it was. On a linearized pipeline
    it starts from the restored one.

    Args:
        pipe: a diffusers pipeline or transformer, FLUX.1 or a variant of it.
        window (`int`, *optional*, defaults to 16): radius in tokens of the disc of image keys that an image
            query sees. A token is 16 x 16 pixels.
        down_factor (`int`, *optional*, defaults to what the weights were distilled for, else 1): side in tokens
            of the cells whose pooled keys every image query sees too; 1 means none.
        weights (*optional*): path of a `.safetensors` file of distilled weights, or None to keep the model's own
            (training-free).
        backend (`str`, defaults to `"auto"`): `"flex"`, `"tiled"`, `"dense"`, or what fits each call best.
        keep_original (`bool`, defaults to `True`): keep the weights that are replaced, on the CPU, so that
            `restore` can put them back.

    Returns:
        ``pipe`` itself.

    Raises:
        TypeError: not a supported pipeline; window or down_factor not a whole number; weights no path.
        ValueError: window or down_factor below 1, or other than what the weights were distilled for; unknown
            backend; weights that do not fit.
        FileNotFoundError: no file of weights there.
        RuntimeError: `backend="flex"` on a machine where it cannot run; attention processors of another
            library; context parallelism; parameters on the meta device; weights for a model that is quantized or
            has a LoRA fused in; a linearized pipeline whose original weights were given up.
    """
    transformer, family = find_transformer(pipe)
    check_backend(backend)
    _check_backend_can_run(backend)
    checkpoint = _load(weights)
    config = _settings(window, down_factor, checkpoint)
    layers = family.attention_layers(transformer)
    check_in_memory(transformer, layers)
    if checkpoint:
        check_replaceable(layers)
        check_checkpoint(checkpoint, layers, type(transformer).__name__)
    stock = original_state(transformer, layers)
    _check_processors(stock.processors, family)
    _check_parallelism(processors_of(layers))
    values = {name: value for name, value in checkpoint.items() if not name.endswith(POOLED)}
    processors = {layer: _new_processor(family, config, layer, attn, checkpoint) for layer, attn in layers.items()}
    before = capture(transformer, layers, values.keys() | stock.values.keys())
    kept = {name: stock.values.get(name, before.values[name]) for name in values} if keep_original else {}
    given_up = bool(values) and not keep_original
    door = DoorIn(family, config, backend, stock._replace(values=kept), given_up)
    try:
        apply(transformer, layers, State(door, processors, {**stock.values, **values}))
    except BaseException:
        apply(transformer, layers, before)
        raise
    return pipe


def restore(pipe: PipelineOrTransformer) -> PipelineOrTransformer:
    """Undoes `linearize`, bit for bit: parameters, processors, hooks. A pipeline that is not linearized stays so.

    What was changed since then by others stays: other hooks, LoRAs, the attention backend.

    Raises:
        TypeError: not a supported pipeline.
        RuntimeError: the original weights were given up with `keep_original=False`, or cannot be put back:
            parameters on the meta device, a LoRA fused in.
    """
    transformer, family = find_transformer(pipe)
    if door_of(transformer):
        layers = family.attention_layers(transformer)
        apply(transformer, layers, original_state(transformer, layers))
    return pipe


def is_linearized(pipe: Any) -> bool:
    """Whether a pipeline's transformer has been linearized.

    Raises:
        TypeError: not a supported pipeline.
    """
    return door_of(find_transformer(pipe)[0]) is not None


@contextlib.contextmanager
def linearized(
    pipe: PipelineOrTransformer,
    window: int | None = None,
    down_factor: int | None = None,
    *,
    weights: str | os.PathLike[str] | None = "auto",
    backend: str = "auto",
) -> Iterator[PipelineOrTransformer]:
    """`linearize` for the length of a `with` block; then the state before, whatever it was.

    Arguments and errors are those of `linearize`.
    """
    transformer, family = find_transformer(pipe)
    layers = family.attention_layers(transformer)
    door = door_of(transformer)
    before = capture(transformer, layers, door.original.values if door else ())
    linearize(pipe, window, down_factor, weights=weights, backend=backend)
    try:
        yield pipe
    finally:
        stock = original_state(transformer, layers)
        values = {**stock.values, **before.values}
        apply(transformer, layers, before._replace(values=values) if before.door else stock)


def _load(weights: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    if weights is None:
        return {}
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights must be a path, 'auto' or None, got {weights!r} of type {type(weights).__name__}")
    if weights == "auto":
        raise ValueError(
            "weights='auto' has no published weights to take in this version; give the path of a .safetensors file, or "
            "weights=None to keep the model's own weights (training-free)"
        )
    return read_checkpoint(weights)


def _settings(window: int | None, down_factor: int | None, checkpoint: Mapping[str, Tensor]) -> ClearConfig:
    """The settings given, and those of the checkpoint where none is; without one, 16 and 1."""
    own_factor = pooled_factor(checkpoint)
    config = ClearConfig(16 if window is None else window, own_factor if down_factor is None else down_factor)
    if checkpoint and config.down_factor != own_factor:
        raise ValueError(
            f"down_factor={config.down_factor} does not fit weights that were distilled for down_factor={own_factor}; "
            "leave it out, or give other weights"
        )
    return config


def _check_backend_can_run(backend: str) -> None:
    """Pipelines move between devices, so only what no device of this machine can run is refused here."""
    if backend != "flex":
        return
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    obstacles = {device: flex.reason_against_device(device) for device in devices}
    if all(obstacles.values()):
        raise RuntimeError(f"backend='flex' cannot run on this machine: {obstacles}; use backend='auto' or 'tiled'")


def _check_processors(processors: Mapping[str, Any], family: Family) -> None:
    for layer, processor in processors.items():
        if type(processor) not in family.stock_processors:
            raise RuntimeError(
                f"{layer} has a {type(processor).__name__}, whose work CLEAR's processor would drop; take it off first "
                "(an IP-Adapter by pipe.unload_ip_adapter()), or load the pipeline anew, then linearize"
            )


def _check_parallelism(processors: Mapping[str, Any]) -> None:
    for layer, processor in processors.items():
        if getattr(processor, "_parallel_config", None) is not None:
            raise RuntimeError(
                f"{layer} runs under diffusers' context parallelism, which splits the sequence without regard to "
                "windows; linearize a pipeline without it"
            )


def _new_processor(
    family: Family,
    config: ClearConfig,
    layer: str,
    attn: Any,
    checkpoint: Mapping[str, Tensor],
) -> nn.Module:
    # Whatever mode the caller is in, the parameter must serve training too, and its values are set here.
    with torch.inference_mode(False), torch.device("cpu"):
        processor = family.new_processor(config.down_factor, layer)
    if layer + POOLED in checkpoint:
        processor.load_state_dict({"spatial_weight": checkpoint[layer + POOLED]})
    return stand_beside(processor, attn)
