"""CLEAR's attention on query, key and value: text queries attend to all tokens, image queries to their window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clear_attn.backends.derivatives import needs_grad
from clear_attn.backends.selection import BACKENDS, select_backend, validate_backend, validate_call
from clear_attn.backends.softmax import softmax_attention
from clear_attn.core.plan import WindowPlan

# A function of query, key, value, scale and a bias that broadcasts to the scores.
DenseAttention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def pool(image: Tensor, plan: Any, spatial_weight: Tensor) -> Tensor:
    """Return weighted sums of image keys or values over the cells of a plan.

    The sum over a cell that the border cuts is multiplied by f^2 / (the number of its tokens).

    Args:
        image: `[batch, heads, image tokens, head_dim]` in tile order.
        plan: a plan with a down_factor f above 1.
        spatial_weight: the learned weight of each position in a cell, f^2 elements in raster order.

    Returns:
        `[batch, heads, pooled tokens, head_dim]`.
    """
    # An offloaded weight may be on another device.
    weight = cell_weight(plan, image.dtype) * spatial_weight.flatten().to(plan.pool_weight.device)
    cells = image.index_select(2, plan.pool_index.flatten()).unflatten(2, plan.pool_index.shape)
    return torch.einsum("bhcnd,cn->bhcd", cells, weight.to(image.dtype))


def cell_weight(plan: Any, dtype: torch.dtype) -> Tensor:
    """Return the plan's `pool_weight`; for float64, recompute it at that precision."""
    weight: Tensor = plan.pool_weight
    if dtype != torch.float64:
        return weight
    return weight.shape[1] / (weight.shape[1] / weight.double()).round() * (weight > 0)


def clear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: WindowPlan,
    *,
    pooled: tuple[Tensor, Tensor] | None = None,
    key_bias: Tensor | None = None,
    text_bias: Tensor | None = None,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    text_attention: DenseAttention | None = None,
) -> Any:
    """Return CLEAR's attention (arXiv 2412.16112): text queries attend to all tokens, image queries to their window.

    Args:
        query: `[batch, heads, queries, head_dim]`, text and image tokens joined in the order of the plan's layout, the
            image tokens in tile order; on a layout with `text_queries=False` image tokens alone. Any floating-point
            dtype; `flex` supports float32, bfloat16 and float16, `triton` bfloat16 and float16.
        key, value: `[batch, key heads, tokens, head_dim]`, text and image tokens in the same order; the key heads
            divide the query's heads (grouped-query attention).
        plan: a plan of `clear_attn.methods.Clear` on a `TokenLayout`.
        pooled (*optional*): the pooled keys and values that `pool` returns; required if the plan's down_factor is above
            1.
        key_bias (*optional*): the bias on the scaled scores of each key, `[batch, keys]`, pooled keys last.
        text_bias (*optional*): the bias on the scores of text queries, in place of `key_bias`; broadcasts to
            `[batch, heads, text tokens, tokens]`. Without text queries it has no effect.
        backend (`str`, defaults to `"auto"`): `"triton"`, `"flex"`, `"tiled"` or `"reference"`; `"auto"` selects one
            for the device and dtype.
        scale (`float`, *optional*, defaults to head_dim^-0.5): the factor of the scores.
        return_lse (`bool`, defaults to `False`): whether to return the log-sum-exp of each query's scaled scores, too.
        text_attention (*optional*): a function that computes the dense attention of text queries from query, key,
            value, scale and bias; by default torch's `scaled_dot_product_attention`. Not used with `return_lse`.

    Returns:
        The output, in the shape and order of the query. With `return_lse`, also the log-sum-exp
        `[batch, heads, queries]` in at least float32.

    Raises:
        ValueError: the backend is unknown, shapes do not match the plan or each other, or the sequence is too long for
            `"reference"`.
        RuntimeError: the backend cannot run on this device, dtype or head_dim.

    Examples:
        >>> from clear_attn import TokenLayout, methods
        >>> plan = methods.Clear(window=4).plan(TokenLayout([(16, 24)], text_tokens=7))
        >>> query, key, value = torch.randn(3, 1, 2, 391, 16).unbind()
        >>> clear_attention(query, key, value, plan).shape
        torch.Size([1, 2, 391, 16])
    """
    _validate_shapes(query, key, value, plan, pooled, key_bias)
    validate_backend(backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    all_key, all_value = key, value
    if pooled is not None:
        all_key, all_value = (torch.cat(parts, dim=2) for parts in zip((key, value), pooled, strict=True))
    properties = query.device, query.dtype, query.shape[-1], needs_grad(query, all_key, all_value)
    if backend == "auto":
        backend = select_backend(*properties).backend
    validate_call(backend, *properties)
    output, lse = BACKENDS[backend].attend(query, all_key, all_value, plan, key_bias, scale, return_lse)
    if plan.text_queries:
        if text_bias is None and key_bias is not None:
            text_bias = key_bias[:, None, None, : key.shape[2]]
        text, text_lse = _attend_text(query[:, :, plan.text], key, value, scale, return_lse, text_bias, text_attention)
        output[:, :, plan.text] = text
        if lse is not None and text_lse is not None:
            lse[:, :, plan.text] = text_lse
    return output if lse is None else (output, lse)


def _attend_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    return_lse: bool,
    bias: Tensor | None,
    attention: DenseAttention | None,
) -> tuple[Tensor, Tensor | None]:
    if attention is None or return_lse:
        return softmax_attention(query, key, value, None, scale, return_lse, bias)
    return attention(query, key, value, scale, bias), None


def _validate_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: WindowPlan,
    pooled: tuple[Tensor, Tensor] | None,
    key_bias: Tensor | None,
) -> None:
    keys = plan.text_tokens + plan.image_tokens
    for name, x, tokens in (("query", query, plan.tokens), ("key", key, keys), ("value", value, keys)):
        other = (
            x.ndim != 4 or x.shape[2] != tokens or x.shape != (*query.shape[:1], x.shape[1], tokens, *query.shape[3:])
        )
        if other or (name == "value" and x.shape != key.shape):
            raise ValueError(
                f"{name} must be [batch, heads, {tokens}, head_dim], shaped as the query, for a layout of "
                f"{plan.text_tokens} text tokens and {plan.image_tokens} image tokens, got {list(x.shape)}; join "
                "text and image tokens, or make a TokenLayout for these lengths"
            )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} heads, which do not divide the query's {query.shape[1]}; give a divisor of them"
        )
    expected = [(*key.shape[:2], plan.pooled_tokens, key.shape[3])] * 2 if plan.pooled_tokens else []
    given = [tuple(x.shape) for x in pooled or ()]
    if given != expected:
        raise ValueError(
            f"pooled must be {f'two tensors of shape {list(expected[0])}' if expected else 'None'} for a plan of "
            f"down_factor {plan.down_factor}, got shapes {given}; make them with clear_attn.backends.attention.pool"
        )
    if key_bias is not None and tuple(key_bias.shape) != (len(query), plan.key_tokens):
        raise ValueError(f"key_bias must be [batch, keys], {[len(query), plan.key_tokens]}, got {list(key_bias.shape)}")
