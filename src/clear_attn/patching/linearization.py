"""Linearize a pipeline in place: resolve the settings, validate everything, apply in one transaction.

After an error or an interrupt half-way, `Change.apply` puts the earlier state back.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from clear_attn.backends.selection import validate_backend, validate_machine
from clear_attn.methods import Method
from clear_attn.methods.schedule import Schedule
from clear_attn.models import ModelAdapter
from clear_attn.models.processors.processor import ClearAttnProcessor
from clear_attn.patching.changes import warn_if_changed
from clear_attn.patching.conflicts import check_hooks, check_parallelism, check_pipeline, check_processors
from clear_attn.patching.hooks import EntryHook, Original
from clear_attn.patching.resolve import fits_arguments, parameters_lost, resolve_method, resolve_saved
from clear_attn.patching.state import State, apply_or_fall_back, capture, match_device_and_dtype, original_state
from clear_attn.patching.target import PipelineOrTransformer, Target, find_target
from clear_attn.utils.validation import check_no_revision
from clear_attn.weights.metadata import make_metadata, read_schedule
from clear_attn.weights.parameters import (
    check_checkpoint,
    check_in_memory,
    check_replaceable,
    own_parameters,
    replaced_parameters,
)
from clear_attn.weights.recognition import Model
from clear_attn.weights.samples import sample
from clear_attn.weights.sources import Checkpoint, load


class Change(NamedTuple):
    """A validated change of a target. It can be applied once.

    Attributes:
        target: what is changed.
        original: the state that `restore` applies.
        state: the state to apply. Its hook is given the replaced values when that happens.
        kept: names of the values that the hook keeps for `restore`.
    """

    target: Target
    original: State
    state: State
    kept: tuple[str, ...]

    def apply(self) -> None:
        """Change the transformer in one transaction, then empty `state.values` to free memory."""
        hook, values = self.state.hook, self.state.values
        assert hook
        before = capture(self.target, values)
        kept = {name: self.original.values.get(name, before.values[name]) for name in self.kept}
        hook.original = Original(self.original.processors, kept, self.original.metadata)
        apply_or_fall_back(self.target, self.state, before)
        values.clear()


class Settings(NamedTuple):
    """The resolved settings.

    Attributes:
        method, schedule, backend, keep_original: the resolved arguments of `linearize`.
        source: the distilled weights; None for the model's own.
        saved: whether the settings are those of a pipeline that was saved while it was linearized.
    """

    method: Method
    schedule: Schedule
    backend: str
    keep_original: bool
    source: Checkpoint | None
    saved: bool


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
    """Make the image attention of a pipeline's transformer local, in place.

    Everything is validated before anything changes; after any error the pipeline is as before. Calling it again
    replaces the earlier settings, as if `restore` came first; a pipeline that is split over ranks stays split.

    Args:
        pipe: a diffusers pipeline, modular or not, or a transformer: FLUX.1, FLUX.2, FLUX.3, Qwen-Image,
            Qwen-Image 2.1, Chroma, Krea 2, Z-Image, Stable Diffusion 3 or 3.5, DiT, or a variant of them.
        window (`int`, *optional*, defaults to what the weights were distilled for, else 16): radius in tokens of
            the disc of image keys to which an image query attends. A token is 16 x 16 pixels, 8 x 8 in the small FLUX.
        down_factor (`int`, *optional*, defaults to what the weights were distilled for, else 1): side in tokens
            of the cells to whose pooled keys every image query attends too; 1 means none.
        method (`Method`, *optional*, defaults to what the weights were distilled for, else CLEAR): another attention
            method of `clear_attn.methods`, instead of window and down_factor. It needs distilled weights to draw well.
        schedule (`Schedule`, *optional*, defaults to that saved with the weights, else none): steps and layers that
            stay dense, and layers with another window.
        weights (`str` or path, *optional*, defaults to `"auto"`): distilled weights. `"auto"` takes those published
            for the very model, window and down_factor: there are some for FLUX.1-dev and for the small FLUX. On a
            pipeline that was saved while it was linearized, it uses the weights in the pipeline. None keeps the model's
            own (training-free). Or a `.safetensors` file, a directory that `save_pretrained` wrote, or a Hub id,
            `owner/repo` or `owner/repo/file.safetensors`.
        revision (`str`, *optional*): a branch, tag or commit of weights on the Hub.
        token (`str` or `bool`, *optional*): a Hub token; by default that of `hf auth login`.
        backend (`str`, defaults to `"auto"`): `"triton"`, `"flex"`, `"tiled"`, `"reference"`, or `"auto"`, which
            selects the fastest for each call.
        keep_original (`bool`, defaults to `True`): keep the weights that are replaced, on the CPU, so that
            `restore` can put them back.

    Returns:
        ``pipe`` itself.

    Raises:
        TypeError: the pipeline is not supported; an argument has the wrong type.
        ValueError: an argument is out of range; the window, down_factor or method differs from what the weights were
            distilled for; a window, backend or schedule with windows does not fit the method; the schedule names
            layers that do not exist; the weights do not fit the model, or none are published for it; a revision is
            given for weights that are not on the Hub.
        FileNotFoundError, PermissionError, ConnectionError: the weights cannot be found or downloaded.
        RuntimeError: the pipeline has no transformer yet; the backend cannot run on this machine; the model has
            attention processors of another library, guidance that changes attention, or context parallelism; its
            parameters are on the meta device; weights are given for a model that is quantized or has a fused LoRA; its
            original weights were discarded.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = clear.linearize(demo.pipeline())
        >>> clear.cost(pipe, 128, 128).method
        Clear(window=8, down_factor=1)
        >>> clear.is_linearized(clear.restore(pipe))
        False
    """
    change = prepare(
        pipe,
        window,
        down_factor,
        method=method,
        schedule=schedule,
        weights=weights,
        revision=revision,
        token=token,
        backend=backend,
        keep_original=keep_original,
    )
    warn_if_changed(change.target, stacklevel=2)
    change.apply()
    return pipe


def prepare(
    pipe: Any,
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
) -> Change:
    """Return the change that `linearize` applies, resolved, loaded and validated; arguments and errors as there."""
    target = find_target(pipe)
    original = original_state(target)
    _validate_target(target, original)
    wanted = resolve_method(window, down_factor, method)
    validate_backend(backend)
    validate_machine(backend)
    if schedule is not None:
        _validate_schedule(target, schedule)
    metadata = original.metadata
    if weights == "auto" and metadata:
        check_no_revision(revision, "weights='auto' keeps those that this pipeline was saved with")
        saved = resolve_saved(window, down_factor, method, metadata)
        settings = Settings(saved, schedule or read_schedule(metadata), backend, keep_original, None, saved=True)
    else:
        fits = functools.partial(fits_arguments, window, down_factor, method)
        source = _load_weights(target, original, weights, wanted, fits, revision, token)
        resolved = resolve_method(window, down_factor, method, source)
        schedule = schedule or (source.schedule if source else Schedule())
        settings = Settings(resolved, schedule, backend, keep_original, source, saved=False)
    return _build_change(target, original, settings)


def _validate_target(target: Target, original: State) -> None:
    """Raise RuntimeError for a pipeline that cannot be linearized as it is."""
    check_pipeline(target.pipe)
    check_in_memory(target.transformer, target.layers)
    check_processors(original.processors, target.adapter)
    check_parallelism(target.processors)
    check_hooks(target.layers)


def _validate_schedule(target: Target, schedule: Schedule) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a clear_attn.Schedule, got {schedule!r} of type {type(schedule).__name__}")
    if schedule.depends_on_sigma and not target.adapter.timestep_is_sigma:
        name = "windows_by_sigma" if schedule.windows_by_sigma else "dense_above_sigma"
        raise ValueError(
            f"{name}={getattr(schedule, name)} needs the share of noise, which a call of a {target.model} does "
            "not give; name layers in dense_layers or windows, or leave the schedule out"
        )
    schedule.validate_layers(list(target.layers), target.model)


def _load_weights(
    target: Target,
    original: State,
    weights: str | os.PathLike[str] | None,
    wanted: Method,
    fits: Callable[[Method], bool],
    revision: str | None,
    token: str | bool | None,
) -> Checkpoint | None:
    if weights is None:
        check_no_revision(revision, "weights=None keeps the model's own")
        return None
    check_replaceable(target.layers)
    return load(weights, Model(target.pipe, target.transformer, original.values), wanted, fits, revision, token)


def _build_change(target: Target, original: State, settings: Settings) -> Change:
    """Return the change to these settings; the target is not changed."""
    method, schedule, source = settings.method, settings.schedule, settings.source
    method.validate_backend(settings.backend)
    if source:  # its schedule was not validated yet
        schedule.validate_layers(list(target.layers), target.model)
    sharder = target.hook.sharder if target.hook else None
    if sharder:
        method.halo()  # raises for a method that is not split over ranks
    described = target.adapter.describe_layers(target.transformer)
    parameters = replaced_parameters(target.layers)
    values = {name: value for name, value in (source.values if source else {}).items() if name in parameters}
    if original.values and not source:  # `_load_weights` checked it for a source
        check_replaceable(target.layers)
    metadata = original.metadata
    recorded = (metadata["weights"], metadata["source"], metadata["training"]) if metadata else (None, None, None)
    hook = EntryHook(
        target.adapter,
        method,
        schedule,
        described,
        settings.backend,
        source.name if source else recorded[0],
        Original(original.processors, {}, metadata),
        originals_discarded=bool(values) and not settings.keep_original,
        sharder=sharder,
    )
    processors = make_processors(target.adapter, method, hook, described, original.processors)
    learned = own_parameters(processors)
    if settings.saved and learned:
        raise parameters_lost(original.metadata or {})
    if source:
        _validate_weights(source, {**parameters, **learned}, target.model)
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(source.values[name])
    for layer, attn in target.layers.items():
        match_device_and_dtype(processors[layer], attn)
        trainable = next(attn.parameters()).requires_grad
        for parameter in processors[layer].parameters(recurse=False):  # the rest is an IP-Adapter's
            parameter.requires_grad_(trainable)
    new = {name: value.to(parameters[name].dtype) for name, value in sample({**original.values, **values}).items()}
    hook.samples = {**sample({**parameters, **learned}), **new}
    weights = (source.label, source.origin, source.training) if source else recorded
    entry = make_metadata(target.transformer, method, schedule, *weights)
    state = State(hook, dict(processors), {**original.values, **values}, entry)
    return Change(target, original, state, kept=tuple(values) if settings.keep_original else ())


def make_processors(
    adapter: ModelAdapter,
    method: Method,
    hook: EntryHook,
    layers: Mapping[str, Any],
    originals: Mapping[str, Any],
) -> dict[str, ClearAttnProcessor]:
    """Return a processor for each layer, with new parameters on the CPU.

    Raises:
        ValueError: a method's settings do not fit a layer.
    """
    # Parameters made in the caller's inference mode could not be trained.
    with torch.inference_mode(False), torch.device("cpu"):
        processors = {
            name: adapter.make_processor(originals[name], method, layer, hook.groups[name])
            for name, layer in layers.items()
        }
    for name, processor in processors.items():
        processor.description = hook.schedule.describe(method, name)
    return processors


def _validate_weights(source: Checkpoint, parameters: Mapping[str, torch.nn.Parameter], model: str) -> None:
    """Raise ValueError if weights are for another model class, or their names, shapes or values do not fit."""
    if source.architecture not in (None, model):
        raise ValueError(
            f"{source.name} was distilled for a {source.architecture}, and this is a {model}; give weights distilled "
            "for this model, or weights=None"
        )
    check_checkpoint(source.values, parameters, model)
