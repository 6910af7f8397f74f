"""Layouts and plans of recent calls, kept by the entry hook: they go with it when a pipeline is restored."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import Plan
from clear_attn.methods import Method

LAYOUTS = 8
PLANS = 32


class PlanCache:
    """The most recently used layouts and plans. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self._layouts: OrderedDict[Hashable, TokenLayout] = OrderedDict()
        self._plans: OrderedDict[Hashable, tuple[Any, Plan]] = OrderedDict()

    def layout(self, grids: tuple[Grid, ...], text_tokens: int, text_first: bool, device: torch.device) -> TokenLayout:
        """Return the layout of calls that agree in the arguments."""
        key = grids, text_tokens, text_first, device
        return _get(
            self._layouts, key, LAYOUTS, lambda: TokenLayout(grids, text_tokens, text_first=text_first, device=device)
        )

    def plan(self, method: Method, layout: Any, make: Callable[[Method, Any], Plan]) -> Plan:
        """Return the plan of a method on a layout, as `make` makes it."""
        # The layout is kept with its plan, so that its identity is not reused while the plan is here.
        return _get(self._plans, (method, id(layout)), PLANS, lambda: (layout, make(method, layout)))[1]

    def __deepcopy__(self, memo: object) -> PlanCache:
        return PlanCache()

    def __reduce__(self) -> tuple[type[PlanCache], tuple[()]]:
        return PlanCache, ()


def _get(cache: OrderedDict[Hashable, Any], key: Hashable, most: int, make: Callable[[], Any]) -> Any:
    found = cache.pop(key, None)
    if found is None:
        found = make()
    cache[key] = found
    while len(cache) > most:
        try:
            cache.popitem(last=False)
        except KeyError:  # another thread was faster
            break
    return found
