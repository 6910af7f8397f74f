"""Softmax attention over a given set of keys: torch's own kernels, and the log-sum-exp that they do not return."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends.derivatives import needs_grad
from clear_attn.utils._torch import cpu_flash_attention, has_cpu_flash_attention


def has_lse_kernel(query: Tensor) -> bool:
    """Return whether a kernel of torch returns the log-sum-exp at no cost. Only the CPU's kernel is used."""
    return query.device.type == "cpu" and has_cpu_flash_attention()


def expand_heads(query: Tensor, *others: Tensor) -> list[Tensor]:
    """Repeat the heads of keys or values, each for its group of query heads."""
    return [
        x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in others
    ]


def to_bias(mask: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a score bias with -inf where a bool mask is False; both broadcast."""
    zeros = torch.zeros_like(mask, dtype=dtype) if bias is None else bias.to(dtype)
    return torch.where(mask, zeros, float("-inf"))


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    return_lse: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention of all queries to all keys that the mask allows.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, key heads, keys, head_dim]`; key heads divide heads (grouped-query attention).
        mask: bool, broadcast to `[batch, heads, queries, keys]`; every query must attend to a key.
        scale: the factor of the scores.
        return_lse: whether the second result is the log-sum-exp of the scaled scores, `[batch, heads, queries]` in at
            least float32, or None. With it, the scores of all pairs are stored, except without gradients where
            `has_lse_kernel`.
        bias: the bias on the scaled scores; broadcasts like the mask.
    """
    key, value = expand_heads(query, key, value)
    if not return_lse:
        added = mask
        if bias is not None:
            added = bias.to(query.dtype) if mask is None else to_bias(mask, bias, query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale), None
    # Without queries, the kernel divides by zero.
    recorded = needs_grad(query, key, value)
    if has_lse_kernel(query) and not recorded and query.numel() and query.dtype == key.dtype == value.dtype:
        bias = bias if mask is None else to_bias(mask, bias, query.dtype)
        bias = None if bias is None else bias.to(query.dtype)
        # Unlike the public function, the kernel assumes contiguous heads.
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return cpu_flash_attention(query, key, value, bias, scale)
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the scores
        scores = _scores(query, key, mask, scale, bias)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[..., None])
        return (weights @ value.to(weights.dtype)).to(query.dtype), lse


def merge_(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor | None) -> None:
    """Merge attention to other keys into output and lse, in place and exactly, weighted by the log-sum-exps."""
    assert other_lse is not None
    output.lerp_(other, torch.sigmoid(other_lse - lse)[..., None].to(output.dtype))
    lse.copy_(torch.logaddexp(lse, other_lse))


def softmax_attention_backward(
    output_gradient: Tensor,
    lse_gradient: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to query, key and value, with the scores of all pairs in memory.

    As in fused kernels, scores and softmax are at least float32, and the other products in the query's dtype.
    """
    with torch.autocast(query.device.type, enabled=False):  # a backward pass may run under autocast
        dtype = query.dtype
        output_gradient, key, value = (x.to(dtype) for x in (output_gradient, key, value))
        groups = key.shape[1]
        key, value = expand_heads(query, key, value)
        weights = torch.softmax(_scores(query, key, mask, scale, bias), dim=-1)
        value_gradient = weights.to(dtype).transpose(-1, -2) @ output_gradient
        weight_gradient = (output_gradient @ value.transpose(-1, -2)).to(weights.dtype)
        mean = (weights * weight_gradient).sum(dim=-1, keepdim=True)
        if lse_gradient is not None:  # the log-sum-exp's gradient by the scores is the weights
            mean = mean - lse_gradient[..., None]
        score_gradient = (weights * (weight_gradient - mean) * scale).to(dtype)
        key_gradient = score_gradient.transpose(-1, -2) @ query
        return score_gradient @ key, _sum_groups(key_gradient, groups), _sum_groups(value_gradient, groups)


def _sum_groups(gradient: Tensor, heads: int) -> Tensor:
    """Return the sum over the query heads that share a key head."""
    return gradient if gradient.shape[1] == heads else gradient.unflatten(1, (heads, -1)).sum(dim=2)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) @ key.to(dtype).transpose(-1, -2)) * scale
    scores = scores if bias is None else scores + bias
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))
