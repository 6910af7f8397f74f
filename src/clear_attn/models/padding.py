"""Padding in the text: what is added to the scores of its keys, by one more dimension of query and key.

A bias that is a product, query_i * key_j, is what a dot product of one more dimension adds. So it takes no mask, which
would grow with the square of the tokens, and every kernel serves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.core.layout import TokenLayout

# Added to a score, it leaves a weight of e^-1000 beside what is visible, 0 in every floating point.
UNSEEN = -1000.0
# Kernels for GPUs want head_dim in multiples of this.
MORE = 8


class Padding(NamedTuple):
    """`query[:, i] * key[:, j]` is added to the score of query i and key j; both `[batch, tokens]`.

    The tokens stand as the model joins them. The key's is 0 for all image tokens, so that pooled keys get nothing.
    """

    query: Tensor
    key: Tensor


def padding_of(layout: TokenLayout, text_query: Tensor, text_key: Tensor) -> Padding:
    """Padding from the text's part, `[batch, text tokens]`; image queries have 1."""
    shape = len(text_key), layout.text_tokens + layout.image_tokens
    query, key = text_query.new_ones(shape), text_key.new_zeros(shape)
    query[:, layout.text], key[:, layout.text] = text_query, text_key
    return Padding(query, key)


def check_mask(name: str, mask: Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError where a mask is not of a shape."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(mask.shape)}; pass it as the pipeline does")


def widen(query: Tensor, key: Tensor, value: Tensor, padding: Padding, scale: float) -> list[Tensor]:
    """Query, key and value `[batch, heads, tokens, head_dim + 8]`, whose scores have the padding's bias in them.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`.
        padding: of their tokens.
        scale: by which the scores will be multiplied.
    """
    wanted = padding.key.float() / scale
    # In two numbers, for one of half precision would round it.
    high = wanted.to(key.dtype)
    parts = [high, (wanted - high.float()).to(key.dtype)]
    share = padding.query.to(query.dtype)
    of_query, of_key = (F.pad(torch.stack(each, dim=-1), (0, MORE - 2)) for each in ([share, share], parts))
    return [
        torch.cat([x, more[:, None].expand(-1, x.shape[1], -1, -1)], dim=-1)
        for x, more in ((query, of_query), (key, of_key), (value, torch.zeros_like(of_key)))
    ]
