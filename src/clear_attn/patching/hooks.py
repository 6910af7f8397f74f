"""The hooks at a linearized transformer's entry and exit, which put image tokens into tile order and back.

Nothing is left on the model: the context travels in the call's own keywords for the attention layers, so that two calls
of different size, a recomputation for gradients or a deep copy each have their own.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clear_attn.backends.selection import select_backend
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import Plan
from clear_attn.methods import Dense, Layer, Method, ScoreBias
from clear_attn.methods.schedule import Schedule
from clear_attn.models import ModelAdapter
from clear_attn.models._diffusers import innermost_forward, is_hooked, set_innermost_forward
from clear_attn.models.context.context import CONTEXT, RECORDER, ROLE, SCALE_MULTIPLIER, TEACHER, ClearContext, Group
from clear_attn.models.hooked import InnerHook
from clear_attn.models.processors.processor import ClearAttnProcessor
from clear_attn.patching.conflicts import check_hooks
from clear_attn.patching.plan_cache import PlanCache
from clear_attn.utils._torch import leaves_of, map_tensors, outside_transforms


class Original(NamedTuple):
    """What `restore` puts back.

    Attributes:
        processors: the attention processors by layer.
        values: the replaced parameters' values on the CPU, by their names in a checkpoint.
        metadata: the entry in the transformer's config, or None.
    """

    processors: dict[str, Any]
    values: dict[str, Tensor]
    metadata: dict[str, Any] | None


class Sharder(Protocol):
    """Splits the calls of a transformer over ranks.

    Attributes:
        ranks: the number of processes.
    """

    ranks: int

    def shard(self, transformer: Any, call: dict[str, Any], layout: TokenLayout, settings: str) -> Any:
        """Return this rank's part of a layout, after a check that all ranks got the same call and settings."""

    def agree_on_backend(self, selected: str) -> str:
        """Return the backend of all ranks, from the one that was selected for the devices of this rank."""

    def plan(self, method: Method, shard: Any) -> Plan:
        """Return the plan of a method on a part of a layout."""

    def inner_hooks(self, adapter: ModelAdapter, transformer: Any) -> list[InnerHook]:
        """Return hooks inside the transformer, after those of its adapter."""


class EntryHook:
    """A forward pre-hook with keywords. Earlier pre-hooks of torch get raster order, later ones tile order.

    Args:
        adapter: the adapter of the transformer.
        method: the method of its layers.
        schedule: the schedule of exceptions by call and layer.
        layers: the attention layers by name.
        backend: a backend, or "auto".
        weights: the source of distilled weights, as given to `linearize`; None for the model's own.
        original: the state before linearizing, for `restore`.
        originals_discarded: whether the replaced values were discarded.
        sharder: an object that splits calls over ranks; None on a single process.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        method: Method,
        schedule: Schedule,
        layers: dict[str, Layer],
        backend: str,
        weights: str | None,
        original: Original,
        originals_discarded: bool,
        sharder: Sharder | None = None,
    ) -> None:
        self.adapter, self.method, self.schedule = adapter, method, schedule
        self.backend, self.weights = backend, weights
        self.original, self.originals_discarded = original, originals_discarded
        self.sharder = sharder
        # A few values of each parameter that linearizing replaces or adds, to notice later changes.
        self.samples: Mapping[str, Tensor] = {}
        self.representatives, self.groups = schedule.group(method, layers.values())
        self.cache = PlanCache()

    def with_sharder(self, sharder: Sharder | None) -> EntryHook:
        """Return a copy that splits calls in another way."""
        hook = copy.copy(self)
        hook.sharder, hook.cache = sharder, PlanCache()
        return hook

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        """Return the hooks inside the transformer."""
        sharder = self.sharder.inner_hooks(self.adapter, transformer) if self.sharder else []
        return [*self.adapter.inner_hooks(transformer), *sharder]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        self.adapter.end_call()  # a call that was interrupted has no exit
        self.validate_installed(transformer)
        call = self.adapter.bind_call(transformer, args, kwargs)
        parsed = self.adapter.parse_call(transformer, call)
        with outside_transforms():
            layout: Any = self.cache.layout(
                parsed.grids,
                parsed.text_tokens,
                self.adapter.text_first,
                parsed.device,
                parsed.padding_tokens,
                self.adapter.text_queries,
            )
        backend = self._select_backend(transformer, call, parsed.device)
        if self.sharder:
            settings = f"{self.method}, {self.schedule}, backend {self.backend}"
            layout = self.sharder.shard(transformer, call, layout, settings)
            if backend != self.backend:  # selected, and so on all ranks, since their settings are the same
                backend = self.sharder.agree_on_backend(backend)
        passed_on = dict(call.get(self.adapter.keywords) or {})
        role = passed_on.pop(ROLE, None)
        methods = [Dense()] * len(self.representatives) if role == TEACHER else self.methods_of(call)
        text_bias = self.adapter.text_bias(call)
        make_groups = functools.partial(self._plan_groups, methods, text_bias, layout, backend)
        context = ClearContext(
            make_groups(layout.device),
            layout,
            make_groups=None if self.sharder else make_groups,
            backend=backend,
            scale_multiplier=passed_on.pop(SCALE_MULTIPLIER, 1.0),
            role=role,
            record=passed_on.pop(RECORDER, None),
        )
        call[self.adapter.keywords] = {**passed_on, CONTEXT: self.adapter.carry(transformer, context)}
        context.permuted = not wrap_forward(transformer, self.adapter)
        return (), self.adapter.permute_inputs(call, layout) if context.permuted else call

    def methods_of(self, call: dict[str, Any]) -> list[Method]:
        """Return the method of each group in a call with these arguments."""
        sigma = self._sigma_of(call)
        return [self.schedule.method_for(self.method, layer, sigma) for layer in self.representatives]

    def method_of(self, call: dict[str, Any]) -> Method:
        """Return the method of the layers that the schedule does not name, in a call with these arguments."""
        return self.schedule.method_for(self.method, Layer(name=""), self._sigma_of(call))

    def _sigma_of(self, call: dict[str, Any]) -> float | None:
        return self.schedule.sigma_of(self.adapter.sigma(call)) if self.schedule.depends_on_sigma else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _plan_groups(
        self,
        methods: Sequence[Method],
        text_bias: tuple[torch.Tensor | None, torch.Tensor | None],
        layout: Any,
        backend: str,
        device: torch.device,
    ) -> list[Group]:
        groups = []
        bias, weight = (None if x is None else x.to(device) for x in text_bias)
        layout = layout if device == layout.device else layout.on(device)
        for method, layer in zip(methods, self.representatives, strict=True):
            own = (layout if layer.has_text else layout.without_text).of_images(layer.images)
            if own is None:
                groups.append(Group(method, None))
                continue
            with outside_transforms():
                plan = self.cache.plan(method, own, self.sharder.plan if self.sharder else type(method).plan)
                plan.prepare(backend)
            groups.append(Group(method, plan, ScoreBias.on_plan(plan, bias if layer.has_text else None, weight)))
        return groups

    def _select_backend(self, transformer: Any, call: dict[str, Any], device: torch.device) -> str:
        """Select once for all layers of a call, so that a recomputation for gradients does as the first one did."""
        if self.backend != "auto" or not self.method.uses_backends:
            return self.backend
        tensors = itertools.chain(leaves_of(call), transformer.parameters())
        needs_grad = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)
        dtype, head_dim = self.adapter.image_input(call).dtype, self.representatives[0].head_dim
        return select_backend(device, dtype, head_dim, needs_grad).backend

    def validate_installed(self, transformer: Any) -> None:
        """Raise RuntimeError if something that linearizing put in place is no longer there, or cannot work."""
        for layer, group in self.groups.items():
            processor = transformer.get_submodule(layer).processor
            own = isinstance(processor, ClearAttnProcessor)
            if not own or processor.method != self.method or processor.group != group:
                raise RuntimeError(
                    f"the attention processor of {layer} was replaced by a {type(processor).__name__} after "
                    "clear_attn.linearize() (an IP-Adapter that comes or goes does that, or fusing SD3's "
                    "projections); call clear_attn.linearize() again after the change, or clear_attn.restore()"
                )
        check_hooks(self.adapter.attention_layers(transformer))
        for inner in self.inner_hooks(transformer):
            if not inner.installed():
                raise RuntimeError(
                    f"{inner.name} of this {type(transformer).__name__} was replaced after clear_attn.linearize() (a "
                    "pipeline does that to SD3.5's ControlNets); call clear_attn.linearize() again after the change"
                )


class ExitHook:
    """A forward hook with keywords, the counterpart of `EntryHook`; the first one, so that others get raster order."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.adapter.end_call()
        context = context_of(self.adapter, kwargs)
        if context is None:
            raise RuntimeError(
                f"this {type(transformer).__name__} was called without its context: a forward pre-hook has changed "
                f"{self.adapter.keywords}, or removed the hook of clear_attn.linearize(); call clear_attn.linearize() "
                "again, and let other hooks keep the keywords that they are given"
            )
        return unpermute(self.adapter, output, context.layout) if context.permuted else output


def context_of(adapter: ModelAdapter, kwargs: dict[str, Any]) -> ClearContext | None:
    """Return the context in the keywords of a call, or None."""
    carried = (kwargs.get(adapter.keywords) or {}).get(CONTEXT)
    return getattr(carried, "context", carried)


class PermutedForward:
    """A transformer's own `forward` in tile order, inside the hooks that diffusers puts around it.

    These get raster order, as they do in a dense model. Without such hooks `EntryHook` and `ExitHook` permute.

    Args:
        forward: the method that it replaces.
        adapter: the adapter of the transformer.
    """

    def __init__(self, forward: Any, adapter: ModelAdapter) -> None:
        self.__wrapped__ = forward  # inspect.signature follows it
        self.adapter = adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = context_of(self.adapter, kwargs)
        if context is None or context.permuted:
            return self.__wrapped__(*args, **kwargs)
        context.permuted = True
        output = self.__wrapped__(*args, **self._permute_inputs(kwargs, context.layout))
        context.permuted = False
        return unpermute(self.adapter, output, context.layout)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _permute_inputs(self, kwargs: dict[str, Any], layout: Any) -> dict[str, Any]:
        return self.adapter.permute_inputs(kwargs, layout)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def unpermute(adapter: ModelAdapter, output: Any, layout: Any) -> Any:
    """Return a transformer's output with all its tensors in raster order."""

    def unpermute_tensor(tensor: torch.Tensor) -> torch.Tensor:
        own = layout if tensor.device == layout.device else layout.on(tensor.device)
        return adapter.unpermute_output(tensor, own)

    return map_tensors(unpermute_tensor, output)


def wrap_forward(transformer: Any, adapter: ModelAdapter) -> bool:
    """Put a `PermutedForward` inside diffusers' hooks, if there are any; return whether there is one."""
    forward = innermost_forward(transformer)
    if is_hooked(transformer) and not isinstance(forward, PermutedForward):
        forward = PermutedForward(forward, adapter)
        set_innermost_forward(transformer, forward)
    return isinstance(forward, PermutedForward)


def unwrap_forward(transformer: Any) -> None:
    """Undo `wrap_forward`."""
    forward = innermost_forward(transformer)
    if isinstance(forward, PermutedForward):
        set_innermost_forward(transformer, forward.__wrapped__)
