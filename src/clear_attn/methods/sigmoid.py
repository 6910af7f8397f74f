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

# How many scores are held at a time.
MAX_SCORES = 2**26


@dataclass(frozen=True)
class Sigmoid(ImageMethod):
    """`sigmoid(scores - log(keys)) @ values` over text and image keys, where `keys` is their number.

    Its work is dense attention's, and grows with the square of the tokens; memory does not. Of what keeps a
    pre-trained model alive it has high rank and intact features; not the formulation, for there is no softmax, and
    of locality what dense attention has.
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
    """`sigmoid(scores - log(keys)) @ values` in float32 at least, some queries at a time.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`, the query of any number of tokens.
        scale: factor of the scores.
        bias: `[batch, keys]`, added to the scaled scores.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, wide = (x.to(dtype) for x in (query, key, value))
    step = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    # Gradients compute the scores once more, so that no more than a step's are held.
    parts = [
        checkpoint(_attend, part, key, wide, bias, use_reentrant=False, preserve_rng_state=False)
        for part in (query * scale).split(step, dim=2)
    ]
    return torch.cat(parts, dim=2).to(value.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):  # which would round the scores
        scores = query @ key.mT - math.log(key.shape[2])
        return torch.sigmoid(scores if bias is None else scores + bias[:, None, None]) @ value
