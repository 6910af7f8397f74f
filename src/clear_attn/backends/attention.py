"""CLEAR's attention on query, key and value: text queries see all, image queries their window and what all see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from clear_attn.backends import BACKENDS, check_backend, check_can_run, choose, choose_aloud
from clear_attn.backends.softmax import softmax_attention
from clear_attn.core.layout import TokenLayout

DenseAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def pool(image: Tensor, layout: TokenLayout, spatial_weight: Tensor) -> Tensor:
    """Weighted sums of image keys or values over the cells of a layout.

    A cell that the grid cuts sums over the tokens it has and is scaled by f^2 / (tokens it has).

    Args:
        image: `[batch, heads, image tokens, head_dim]` in tile order.
        layout: with a down_factor f above 1.
        spatial_weight: the learned weight of each place in a cell, f^2 elements in raster order.

    Returns:
        `[batch, heads, pooled tokens, head_dim]`.
    """
    # An offloaded weight may wait elsewhere.
    weight = layout.pool_weight * spatial_weight.flatten().to(layout.pool_weight.device)
    cells = image.index_select(2, layout.pool_index.flatten()).unflatten(2, layout.pool_index.shape)
    return torch.einsum("bhcnd,cn->bhcd", cells, weight.to(image.dtype))


@overload
def clear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    pooled: tuple[Tensor, Tensor] | None = ...,
    backend: str = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    text_attention: DenseAttention | None = ...,
) -> Tensor: ...


@overload
def clear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    pooled: tuple[Tensor, Tensor] | None = ...,
    backend: str = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    text_attention: DenseAttention | None = ...,
) -> tuple[Tensor, Tensor]: ...


def clear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    pooled: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    text_attention: DenseAttention | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as in CLEAR (arXiv 2412.16112).

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`, the text tokens and the image tokens joined as the
            layout says, the image tokens in tile order; any floating point, of which `flex` takes float32,
            bfloat16 and float16.
        layout (`TokenLayout`): where the tokens stand.
        pooled (*optional*): pooled keys and values as `pool` makes them, needed where the layout's down_factor
            is above 1.
        backend (`str`, defaults to `"auto"`): `"flex"`, `"tiled"`, `"dense"`, or what fits the call best.
        scale (`float`, *optional*, defaults to head_dim^-0.5): factor of the scores.
        return_lse (`bool`, defaults to `False`): also return the log-sum-exp of each query's scaled scores.
        text_attention (*optional*): computes the plain attention of queries that see all, those of text and, in a
            dense layout, all of them, from query, key, value and scale; by default torch's
            `scaled_dot_product_attention`. Not used with `return_lse`.

    Returns:
        The output, shaped and ordered as the query; with `return_lse` also `[batch, heads, tokens]`, float32 at least.

    Raises:
        ValueError: unknown backend; shapes or pooled keys that do not fit the layout or each other; `"dense"` on a
            long sequence.
        RuntimeError: `"flex"` where it cannot run, or on a CPU with gradients.
    """
    _check_shapes(query, key, value, layout, pooled)
    check_backend(backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if layout.config is None:
        output, lse = _see_all(query, key, value, scale, return_lse, text_attention)
        return output if lse is None else (output, lse)
    all_key, all_value = key, value
    if pooled is not None:
        all_key, all_value = (torch.cat(parts, dim=2) for parts in zip((key, value), pooled, strict=True))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, all_key, all_value))
    properties = query.device, query.dtype, query.shape[-1], needs_grad
    if backend == "auto":
        # A compiled graph cannot log.
        backend = (choose if torch.compiler.is_compiling() else choose_aloud)(*properties).backend
    check_can_run(backend, *properties)
    output, lse = BACKENDS[backend].attend(query, all_key, all_value, layout, scale, return_lse)
    if layout.text_tokens:
        text, text_lse = _see_all(query[:, :, layout.text], key, value, scale, return_lse, text_attention)
        output[:, :, layout.text] = text
        if lse is not None and text_lse is not None:
            lse[:, :, layout.text] = text_lse
    return output if lse is None else (output, lse)


def _see_all(
    query: Tensor, key: Tensor, value: Tensor, scale: float, return_lse: bool, attention: DenseAttention | None
) -> tuple[Tensor, Tensor | None]:
    """Of queries that see every token: those of text, and all in a dense layout."""
    if attention is None or return_lse:
        return softmax_attention(query, key, value, None, scale, return_lse)
    return attention(query, key, value, scale), None


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, pooled: tuple[Tensor, Tensor] | None
) -> None:
    tokens = layout.text_tokens + layout.image_tokens
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[2] != tokens or x.shape != query.shape:
            raise ValueError(
                f"{name} must be [batch, heads, {tokens}, head_dim], shaped as the query, for a layout of "
                f"{layout.text_tokens} text tokens and {layout.image_tokens} image tokens, got {list(x.shape)}; join "
                "text and image tokens, or make a TokenLayout for these lengths"
            )
    expected = [(*query.shape[:2], layout.pooled_tokens, query.shape[3])] * 2 if layout.pooled_tokens else []
    given = [tuple(x.shape) for x in pooled or ()]
    if given != expected:
        raise ValueError(
            f"pooled must be {f'two tensors of shape {list(expected[0])}' if expected else 'None'} for a layout of "
            f"down_factor {layout.down_factor}, got shapes {given}; make them with clear_attn.backends.attention.pool"
        )
