"""Sigmoid attention (arXiv 2409.04431): each pair's weight is the sigmoid of its own score alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clear_attn.core.coordinates import Grid
from clear_attn.methods.method import ImageMethod, Options

# The most scores in memory at a time.
MAX_SCORES = 2**26


@dataclass(frozen=True)
class Sigmoid(ImageMethod):
    """`sigmoid(scores - log(keys)) @ values` over text and image keys, where `keys` is their number.

    Its work grows with the square of the tokens, as dense attention's; memory does not. Of the four properties that
    CLEAR's paper asks for, it keeps high rank, intact features and the locality of dense attention. It does not keep
    the formulation, because there is no softmax.
    """

    quadratic = "attention to all keys"
    supports_segments = True

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        image, inner = grid[0] * grid[1], heads * head_dim
        return {
            "image queries, text keys": 4 * image * text_tokens * inner,
            "image queries, image keys": 4 * image * image * inner,
        }

    def attend_image(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        return sigmoid_attention(query, key, value, options.scale, options.bias.keys if options.bias else None)


def sigmoid_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Return `sigmoid(scores - log(keys)) @ values`, computed in at least float32 and in parts of the queries.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`; the query may have fewer tokens.
        scale: the factor of the scores.
        bias: the bias on the scaled scores, `[batch, keys]`, or None.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, wide = (x.to(dtype) for x in (query, key, value))
    step = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    # Checkpointed, so that the backward pass also holds the scores of one part at a time.
    parts = [
        checkpoint(_attend, part, key, wide, bias, use_reentrant=False, preserve_rng_state=False)
        for part in (query * scale).split(step, dim=2)
    ]
    return torch.cat(parts, dim=2).to(value.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the scores
        scores = query @ key.mT - math.log(key.shape[2])
        return torch.sigmoid(scores if bias is None else scores + bias[:, None, None]) @ value
