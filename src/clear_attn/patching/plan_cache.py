"""Layouts and plans of recent calls, kept by the entry hook: they go with it when a pipeline is restored."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import Plan
from clear_attn.methods import Method

LAYOUTS = 8


class PlanCache:
    """The most recently used layouts, and their plans, which last as long. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self._layouts: OrderedDict[Any, TokenLayout] = OrderedDict()
        self._plans: weakref.WeakKeyDictionary[Any, dict[Method, Plan]] = weakref.WeakKeyDictionary()

    def layout(
        self,
        grids: tuple[Grid, ...],
        text_tokens: int,
        text_first: bool,
        device: torch.device,
        padding_tokens: int = 0,
        text_queries: bool = True,
    ) -> TokenLayout:
        """Return the layout of calls that agree in the arguments."""
        key = grids, text_tokens, text_first, device, padding_tokens, text_queries
        found = self._layouts.pop(key, None)
        if found is None:
            found = TokenLayout(
                grids,
                text_tokens,
                text_first=text_first,
                device=device,
                padding_tokens=padding_tokens,
                text_queries=text_queries,
            )
        self._layouts[key] = found
        while len(self._layouts) > LAYOUTS:
            try:
                self._layouts.popitem(last=False)
            except KeyError:  # another thread was faster
                break
        return found

    def plan(self, method: Method, layout: Any, make: Callable[[Method, Any], Plan]) -> Plan:
        """Return the plan of a method on a layout, or on a rank's part of one, as `make` makes it."""
        plans = self._plans.setdefault(layout, {})
        if method not in plans:
            plans[method] = make(method, layout)
        return plans[method]

    def __reduce__(self) -> tuple[type[PlanCache], tuple[()]]:
        return PlanCache, ()
