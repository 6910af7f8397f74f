"""The hooks at a linearized transformer's entrance and exit, which put image tokens into tile order and back.

Nothing is left on the model: the layout travels in the call's own keywords for the attention layers, so that two calls
of different size, a recomputation for gradients or a deep copy each see their own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from clear_attn.backends import BACKENDS, choose_aloud
from clear_attn.core.layout import Grid, TokenLayout
from clear_attn.methods import Method
from clear_attn.methods.schedule import Schedule
from clear_attn.models import ModelAdapter
from clear_attn.models.adapter import InnerHook
from clear_attn.models.conflicts import check_hooks
from clear_attn.models.processors import BACKEND, LAYOUT, PADDING, AttnProcessor
from clear_attn.utils.validation import ClearConfig

if TYPE_CHECKING:
    from clear_attn.patching.state import State


@functools.lru_cache(maxsize=8)
def layout_for(
    grids: tuple[Grid, ...],
    text_tokens: int,
    config: ClearConfig | Method | None,
    text_first: bool,
    device: torch.device,
) -> TokenLayout:
    """The layout, made once for all calls that agree in the arguments."""
    return TokenLayout(grids, text_tokens, config, text_first=text_first, device=device)


class Spread(Protocol):
    """Splits the calls of a transformer over processes.

    Attributes:
        ranks: how many processes.
    """

    ranks: int

    def share(self, transformer: Any, call: dict[str, Any], layout: TokenLayout, settings: str) -> Any:
        """The layout of this process's part, which has what a `TokenLayout` has; settings must be those of all."""

    def inner_hooks(self, family: ModelAdapter, transformer: Any) -> list[InnerHook]:
        """Hooks inside the transformer, behind those of its family."""


class DoorIn:
    """A forward pre-hook with keywords. Pre-hooks that were there before see raster order, later ones tile order.

    Args:
        family: what kind of transformer it stands at.
        config: the window and down_factor of its calls, or another method.
        schedule: which of them, and which layers, differ.
        backend: of its calls, or "auto".
        original: the transformer's state before, for `restore`.
        given_up: whether the values that were replaced have not been kept.
        spread: splits its calls; None where this process computes all.
    """

    def __init__(
        self,
        family: ModelAdapter,
        config: ClearConfig | Method,
        schedule: Schedule,
        backend: str,
        original: State,
        given_up: bool,
        spread: Spread | None = None,
    ) -> None:
        self.family = family
        self.config = config
        self.schedule = schedule
        self.backend = backend
        self.original = original
        self.given_up = given_up
        self.spread = spread

    def with_spread(self, spread: Spread | None) -> DoorIn:
        door = copy.copy(self)
        door.spread = spread
        return door

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        """The hooks inside the transformer."""
        spread = self.spread.inner_hooks(self.family, transformer) if self.spread else []
        return [*self.family.inner_hooks(transformer), *spread]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        self.check(transformer)
        call = inspect.signature(transformer.forward).bind(*args, **kwargs).arguments
        grids, text_tokens, device = self.family.parse_call(transformer, call)
        layout = layout_for(grids, text_tokens, self.config_of(call), self.family.text_first, device)
        backend = self._choose_backend(transformer, call, layout)
        if self.spread:
            settings = f"{self.config}, {self.schedule}, backend {backend}"
            layout = self.spread.share(transformer, call, layout, settings)
        self._prepare(transformer, layout, backend)
        entered = self.family.permute_inputs(call, layout)
        own: dict[str, Any] = {LAYOUT: layout, BACKEND: backend}
        if (padding := self.family.padding(call, layout)) is not None:
            own[PADDING] = padding
        self.family.publish(own)
        entered[self.family.keywords] = {**(call.get(self.family.keywords) or {}), **own}
        return (), entered

    def config_of(self, call: dict[str, Any]) -> ClearConfig | Method | None:
        """Of a call with these arguments; None where it stays dense."""
        if self.schedule.dense_above is None:
            return self.config
        return None if self.schedule.is_dense(self.family.sigma(call)) else self.config

    def _prepare(self, transformer: Any, layout: TokenLayout, backend: str) -> None:
        """Makes what the layers will need of a layout, for compiled ones cannot."""
        layers = self.original.processors
        alone = not all(self.family.has_text(transformer, layer) for layer in layers)
        for window in (None, *self.schedule.own_windows(layers)):
            own = layout.within(window)
            for each in (own, own.without_text) if alone else (own,):
                if isinstance(each.config, Method):
                    if each.prepared is None:
                        each.prepared = each.config.prepare(each)
                elif each.config is not None:
                    BACKENDS[backend].prepare(each)

    def _choose_backend(self, transformer: Any, call: dict[str, Any], layout: TokenLayout) -> str:
        """Once for all layers of a call, so that a recomputation for gradients does as the first computation did."""
        if self.backend != "auto" or isinstance(self.config, Method):  # which has no backends
            return self.backend
        tensors = itertools.chain(tree_leaves(call), transformer.parameters())
        needs_grad = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)
        dtype, head_dim = call["hidden_states"].dtype, transformer.config.attention_head_dim
        return choose_aloud(layout.device, dtype, head_dim, needs_grad).backend

    def check(self, transformer: Any) -> None:
        """Raises RuntimeError where something that linearizing put in place is no longer there, or cannot work."""
        for layer in self.original.processors:
            processor = transformer.get_submodule(layer).processor
            stands = isinstance(processor, AttnProcessor) and processor.fits(self.config)
            if not stands or processor.own_window != self.schedule.window_of(layer):
                raise RuntimeError(
                    f"the attention processor of {layer} was replaced by a {type(processor).__name__} after "
                    "clear_attn.linearize() (an IP-Adapter that comes or goes does that, or fusing SD3's "
                    "projections); call clear_attn.linearize() again after the change, or clear_attn.restore()"
                )
        check_hooks(self.family.attention_layers(transformer))
        for inner in self.inner_hooks(transformer):
            if not inner.installed():
                raise RuntimeError(
                    f"a {type(inner.module).__name__} of this {type(transformer).__name__} was replaced after "
                    "clear_attn.linearize() (a pipeline does that to SD3.5's ControlNets); call clear_attn.linearize() "
                    "again after the change"
                )


class DoorOut:
    """A forward hook with keywords, the counterpart of `DoorIn`. It stands first, so that others see raster order."""

    def __init__(self, family: ModelAdapter) -> None:
        self.family = family

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        layout = kwargs[self.family.keywords][LAYOUT]
        self.family.publish(None)
        return tree_map_only(torch.Tensor, lambda tensor: self.family.unpermute_output(tensor, layout), output)
