"""Dense attention: every token attends to every token, as in the original model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import Plan
from clear_attn.methods.method import Method, Options


@dataclass(frozen=True)
class Dense(Method):
    """Attend to all tokens, as the original model does.

    A `Schedule` uses this method for dense layers and steps.
    """

    quadratic = "attention to all keys"
    supports_segments = True

    def plan(self, layout: TokenLayout) -> DensePlan:
        return DensePlan(layout)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        output: Tensor = plan.attend(query, key, value, None, options)
        return output

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        image = grid[0] * grid[1]
        pairs = {"image queries, text keys": image * text_tokens, "image queries, image keys": image**2}
        return {kind: 4 * number * heads * head_dim for kind, number in pairs.items()}

    def covers(self, grid: Grid) -> bool:
        return True

    def halo(self) -> float:
        return math.inf


class DensePlan(Plan):
    """The plan of dense attention on a single process."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, pooled: None, options: Options) -> Tensor:
        """Return the attention of all queries, `[batch, heads, tokens, head_dim]`."""
        bias = options.bias
        if bias is None or not bias.weighted:
            return options.dense(query, key, value, options.scale, bias.text_queries if bias else None)
        output = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
        for rows, rows_bias in ((self.text, bias.text_queries), (self.image, bias.keys[:, None, None])):
            output[:, :, rows] = options.dense(query[:, :, rows], key, value, options.scale, rows_bias)
        return output
