"""`info`: the method, weights, backend and schedule of a linearized model."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass
from typing import Any

from clear_attn.backends.selection import select_backend
from clear_attn.methods import Method
from clear_attn.methods.schedule import Schedule
from clear_attn.models._diffusers import execution_device_of
from clear_attn.models.class_names import is_instance
from clear_attn.patching.changes import changed_parameters
from clear_attn.patching.hooks import EntryHook
from clear_attn.patching.restoration import left_dense
from clear_attn.patching.target import Target, entry_hook_of, find_target
from clear_attn.weights.metadata import metadata_of

OWN_WEIGHTS = "the model's own (training-free)"


@dataclass(frozen=True, repr=False)
class Info:
    """The settings of a linearized model, as `info` returns them; it prints as a table, in a notebook too.

    Attributes:
        model (`str`): the transformer class.
        method (`Method`): the method, with its window.
        weights (`str`, *optional*): the source of the distilled weights; None for the model's own (training-free).
        source (`str`, *optional*): the first origin of the weights, such as the published file; None if not recorded.
        changed (`int`): the number of attention parameters that changed since `linearize`, such as by training.
        backend (`str`, *optional*): the backend of calls; None for a method without backends.
        backend_reason (`str`): the reason for this backend.
        schedule (`Schedule`): exceptions by step and layer.
        layers (`dict`): the method of each attention layer by name, in calls below all sigmas of the schedule.
        restorable (`bool`): whether the original weights are kept for `restore`.
        ranks (`int`): the number of processes that share an image.
        controlnets (tuple of `Info`): the ControlNets of a pipeline; None for a dense one.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = clear.linearize(demo.pipeline(), window=8, weights=None)
        >>> clear.info(pipe).method
        Clear(window=8, down_factor=1)
    """

    model: str
    method: Method
    weights: str | None
    source: str | None
    changed: int
    backend: str | None
    backend_reason: str
    schedule: Schedule
    layers: dict[str, Method]
    restorable: bool
    ranks: int = 1
    controlnets: tuple[Info | None, ...] = ()

    def _rows(self) -> list[tuple[str, str]]:
        counts = Counter(repr(method) for method in self.layers.values())
        rows = [
            ("model", self.model),
            ("method", repr(self.method)),
            ("weights", self._weights()),
            ("backend", f"{self.backend or 'none'}: {self.backend_reason}"),
            ("layers", ", ".join(f"{number} {method}" for method, number in counts.items())),
            ("schedule", "none" if self.schedule == Schedule() else repr(self.schedule)),
            ("original", "kept, for restore" if self.restorable else "discarded; load the pipeline again"),
        ]
        if self.ranks > 1:
            rows.append(("ranks", str(self.ranks)))
        for number, net in enumerate(self.controlnets, start=1):
            rows.append((f"ControlNet {number}", f"{net.method!r}, {net._weights()}" if net else "dense"))
        return rows

    def _weights(self) -> str:
        origin = f", from {self.source}" if self.source not in (None, self.weights) else ""
        since = f"; {self.changed} parameter{'s' * (self.changed > 1)} changed since" if self.changed else ""
        return f"{self.weights or OWN_WEIGHTS}{origin}{since}"

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._rows())
        return f"<table>{''.join(rows)}</table>"


def info(pipe: Any) -> Info:
    """Return the method, weights, backend, schedule and layers of a linearized pipeline, transformer or ControlNet.

    The backend is that of a call without gradients on the present device. `"auto"` checks it on a GPU before the first
    use, which may take seconds.

    Args:
        pipe: a linearized pipeline, transformer or ControlNet.

    Raises:
        TypeError: the pipeline is not supported.
        RuntimeError: the model is dense.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = clear.linearize(demo.pipeline(), window=8, weights=None)
        >>> print(clear.info(pipe))
        model     FluxTransformer2DModel
        method    Clear(window=8, down_factor=1)
        weights   the model's own (training-free)
        backend   tiled: faster than flex, or level, at all sizes measured (benchmarks/results/auto-cpu-*.json)
        layers    6 Clear(window=8, down_factor=1)
        schedule  none
        original  kept, for restore
    """
    target = find_target(pipe)
    hook = target.hook
    if hook is None:
        left = left_dense(target.transformer)
        raise RuntimeError(left or f"this {target.model} is dense; call clear_attn.linearize(pipe) first")
    backend, reason = _backend_of(target, hook)
    metadata = metadata_of(target.transformer)
    return Info(
        model=target.model,
        method=hook.method,
        weights=hook.weights,
        source=metadata["source"] if metadata else None,
        changed=len(changed_parameters(target)),
        backend=backend,
        backend_reason=reason,
        schedule=hook.schedule,
        layers={name: hook.schedule.method_of(hook.method, name) for name in target.layers},
        restorable=not hook.originals_discarded,
        ranks=hook.sharder.ranks if hook.sharder else 1,
        controlnets=tuple(info(net) if entry_hook_of(net) else None for net in controlnets_of(pipe)),
    )


def controlnets_of(pipe: Any) -> list[Any]:
    """Return the ControlNets of a pipeline; none of a transformer."""
    controlnet = getattr(pipe, "controlnet", None)
    return [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))


def _backend_of(target: Target, hook: EntryHook) -> tuple[str | None, str]:
    if not hook.method.uses_backends:
        return None, f"{type(hook.method).__name__} has an implementation of its own"
    if hook.backend != "auto":
        return hook.backend, "as given to linearize"
    is_pipeline = is_instance(target.pipe, ("DiffusionPipeline", "ModularPipeline"))
    device = execution_device_of(target.pipe) if is_pipeline else target.transformer.device
    if device.type == "meta":
        return "auto", "selected in each call, since the weights are offloaded"
    head_dim = hook.representatives[0].head_dim
    found = select_backend(device, target.transformer.dtype, head_dim, needs_grad=False)
    return found.backend, found.reason
