"""Softmax attention over a given set of keys: torch's own kernels, or with the log-sum-exp that they keep back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of all queries to all keys that the mask allows.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`.
        mask: bool, broadcast to `[batch, heads, queries, keys]`; every query must see a key.
        scale: factor of the scores.
        return_lse: whether the second result is the log-sum-exp of the scaled scores, float32
            `[batch, heads, queries]`, or None. With it, the scores of all pairs are held in memory.
    """
    if not return_lse:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale), None
    with torch.autocast(query.device.type, enabled=False):  # which would round the scores
        scores = (query.float() @ key.float().transpose(-1, -2)) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[..., None])
        return (weights @ value.float()).to(query.dtype), lse
