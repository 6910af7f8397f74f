"""The fused kernels as a custom operator, for eager, compiled and checkpointed models."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clear_attn.backends.derivatives import refuse_second_backward, validate_derivatives
from clear_attn.backends.triton import interpreter
from clear_attn.backends.triton.configurations import Configuration, configuration
from clear_attn.backends.triton.support import architecture
from clear_attn.core.key_lists import BLOCK_KEYS, TILE_ROWS, KeyLists, SharedKeys
from clear_attn.core.region import expand_to_sequence

LOG2_E = 1.4426950408889634
# For the gradients of shared keys: the intended number of programs, and the fewest queries that one of them sums.
SHARED_PROGRAMS, LEAST_SPAN = 1024, 1024


class Region(Protocol):
    """The part of a plan that this backend reads."""

    @property
    def key_lists(self) -> KeyLists: ...

    @property
    def query_lists(self) -> KeyLists: ...

    @property
    def shared_keys(self) -> SharedKeys: ...

    @property
    def image(self) -> slice: ...


class Sizes(NamedTuple):
    """The positions of the image tokens.

    Attributes:
        first_query, queries: the position of the first image query, and the number of image queries.
        before, image, after: the number of shared keys before the image keys, of image keys, of shared keys after.
    """

    first_query: int
    queries: int
    before: int
    image: int
    after: int


class Call(NamedTuple):
    """The arguments that all kernels of a call share.

    Attributes:
        query, key, value: `[batch, heads, tokens, head_dim]`, with contiguous channels and rows a multiple of 16 apart.
        key_bias: the bias on the scaled scores, float32 `[batch, keys]`, or None.
        shift: the query at row r is row r + shift of the output, its gradient and the log-sum-exp.
        scale: the factor of the scores, above 0.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    shift: int
    scale: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, shift: int, scale: float) -> Call:
        query, key, value = (_with_aligned_rows(x) for x in (query, key, value))
        return cls(query, key, value, None if key_bias is None else key_bias.float().contiguous(), shift, scale)

    @property
    def group(self) -> int:
        """The number of query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def bias_arguments(self) -> tuple[Tensor, int]:
        """The bias and its batch stride; without a bias, a placeholder that is not read."""
        return (self.query, 0) if self.key_bias is None else (self.key_bias, self.key_bias.stride(0))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Region,
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `clear_attn.backends`. Time and memory are linear in the image tokens."""
    validate_derivatives("triton", query, key, value)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    sizes = Sizes(region.image.start, region.image.stop - region.image.start, *region.shared_keys)
    key_lists = list(region.key_lists)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    query_lists = list(region.query_lists) if needs_grad else []
    if scale <= 0:  # the kernels scale the maximum of the scores, so the factor must be positive
        query, scale = query * scale, 1.0
    image = slice(sizes.first_query, sizes.first_query + sizes.queries)
    tokens = query.shape[2]
    if not query_lists:  # written where it belongs, without a copy
        output, lse = _attend(query, key, value, key_bias, key_lists, query_lists, list(sizes), tokens, 0, scale)
        return output.transpose(1, 2), lse if return_lse else None
    # The caller writes text rows into the output, so they must not be saved for the backward pass.
    arguments = key_lists, query_lists, list(sizes), sizes.queries, -sizes.first_query, scale
    output, lse = _attend(query, key, value, key_bias, *arguments)
    whole = expand_to_sequence(output.transpose(1, 2), tokens, image)
    return whole, expand_to_sequence(lse, tokens, image) if return_lse else None


@torch.library.custom_op("clear_attn::triton", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_lists: list[Tensor],
    query_lists: list[Tensor],
    sizes: list[int],
    tokens: int,
    shift: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return `[batch, tokens, heads, head_dim]` and `[batch, heads, tokens]`; see `Call` for `shift`."""
    output, lse = _new_results(query, tokens)
    call = Call.of(query, key, value, key_bias, shift, scale)
    launch_forward(call, KeyLists(*key_lists), output, lse)
    return output, lse


@_attend.register_fake
def _(query, key, value, key_bias, key_lists, query_lists, sizes, tokens, shift, scale):  # type: ignore[no-untyped-def]
    return _new_results(query, tokens)


@torch.library.custom_op("clear_attn::triton_backward", mutates_args=())
def _attend_backward(
    output_gradient: Tensor,
    delta: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_lists: list[Tensor],
    query_lists: list[Tensor],
    sizes: list[int],
    shift: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; `delta` is `[batch, heads, tokens]`, as the log-sum-exp."""
    call = Call.of(query, key, value, key_bias, shift, scale)
    upstream = Upstream(_with_aligned_rows(output_gradient.transpose(1, 2)), lse, delta)
    gradients = _new_gradients(query, key, value)
    launch_query_gradient(call, KeyLists(*key_lists), upstream, gradients[0])
    launch_key_gradients(call, KeyLists(*query_lists), upstream, gradients[1], gradients[2])
    found = Sizes(*sizes)
    if found.before + found.after:
        sums = shared_key_gradients(call, found, upstream)
        for gradient, of_shared in zip(gradients[1:], sums, strict=True):
            gradient[:, :, : found.before] = of_shared[:, :, : found.before]
            gradient[:, :, found.before + found.image :] = of_shared[:, :, found.before :]
    return gradients


@_attend_backward.register_fake
def _(output_gradient, delta, lse, query, key, value, *rest):  # type: ignore[no-untyped-def]
    return _new_gradients(query, key, value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_bias, key_lists, query_lists, ctx.sizes, _, ctx.shift, ctx.scale = inputs
    ctx.save_for_backward(*output, query, key, value, key_bias, *key_lists, *query_lists)


def _backward(ctx: Any, output_gradient: Tensor, lse_gradient: Tensor) -> tuple[Any, ...]:
    output, lse, query, key, value, key_bias, *lists = ctx.saved_tensors
    both = len(lists) // 2
    delta = (output.float() * output_gradient.float()).sum(dim=-1).transpose(1, 2)
    delta = (delta - lse_gradient).contiguous()
    gradients = _attend_backward(
        output_gradient,
        delta,
        lse,
        query,
        key,
        value,
        key_bias,
        lists[:both],
        lists[both:],
        ctx.sizes,
        ctx.shift,
        ctx.scale,
    )
    return *gradients, None, [None] * both, [None] * both, None, None, None, None


_attend.register_autograd(_backward, setup_context=_setup_context)
_attend_backward.register_autograd(refuse_second_backward("triton"))


def _new_results(query: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = query.shape
    output = query.new_empty(batch, tokens, heads, head_dim)
    return output, query.new_empty(batch, heads, tokens, dtype=torch.float32)


def _new_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors for the gradients, stored as `[batch, tokens, heads, head_dim]`; zeros for text queries."""
    of_query = query.new_zeros(query.transpose(1, 2).shape).transpose(1, 2)
    of_key, of_value = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (key, value))
    return of_query, of_key, of_value


def _with_aligned_rows(x: Tensor) -> Tensor:
    """Return a tensor whose channels are contiguous and whose rows are a multiple of 16 apart, as models make them."""
    return x if x.stride(-1) == 1 and x.stride(-2) % 16 == 0 else x.contiguous()


class Upstream(NamedTuple):
    """The inputs of the backward kernels.

    Attributes:
        gradient: the gradient of the output, `[batch, heads, rows, head_dim]`.
        lse, delta: float32 `[batch, heads, rows]`, contiguous; delta is the dot product of output and gradient.
    """

    gradient: Tensor
    lse: Tensor
    delta: Tensor


def launch_forward(call: Call, lists: KeyLists, output: Tensor, lse: Tensor) -> None:
    """Write output `[batch, rows, heads, head_dim]` and log-sum-exp `[batch, heads, rows]`."""
    bias, bias_batch = call.bias_arguments
    tensors = call.query, call.key, call.value, bias, output, lse, *lists
    strides = _strides(call.query, call.key, call.value, output.transpose(1, 2))
    numbers = *lse.stride()[:2], bias_batch, call.shift, call.group, call.scale * LOG2_E
    _launch("forward", call, (len(lists.rows), call.query.shape[1]), *tensors, *strides, *numbers)


def launch_query_gradient(call: Call, lists: KeyLists, upstream: Upstream, gradient: Tensor) -> None:
    """Write the gradient of the image queries."""
    bias, bias_batch = call.bias_arguments
    tensors = call.query, call.key, call.value, bias, *upstream, gradient, *lists
    strides = _strides(call.query, call.key, call.value, upstream.gradient, gradient)
    numbers = *upstream.lse.stride()[:2], bias_batch, call.shift, call.group, call.scale * LOG2_E
    _launch("query_gradient", call, (len(lists.rows), call.query.shape[1]), *tensors, *strides, *numbers)


def launch_key_gradients(
    call: Call, lists: KeyLists, upstream: Upstream, key_gradient: Tensor, value_gradient: Tensor
) -> None:
    """Write the gradients of the image keys and values, two tensors with the same strides."""
    bias, bias_batch = call.bias_arguments
    tensors = call.query, call.key, call.value, bias, *upstream, key_gradient, value_gradient, *lists
    strides = _strides(call.query, call.key, call.value, upstream.gradient, key_gradient)
    numbers = *upstream.lse.stride()[:2], bias_batch, call.shift, call.group, call.scale * LOG2_E
    _launch("key_gradients", call, (len(lists.rows), call.key.shape[1]), *tensors, *strides, *numbers)


def shared_key_gradients(call: Call, sizes: Sizes, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """Return the gradients of shared keys and values, float32 `[batch, heads, shared keys, head_dim]`.

    Queries are summed in spans, then the spans, always in the same order.
    """
    shared = sizes.before + sizes.after
    batch, heads, _, head_dim = call.key.shape
    of_a_span = -(-shared // TILE_ROWS) * batch * heads
    spans = max(1, min(SHARED_PROGRAMS // of_a_span, sizes.queries // LEAST_SPAN))
    span = -(-sizes.queries // (spans * TILE_ROWS)) * TILE_ROWS
    spans = -(-sizes.queries // span)
    parts = [call.key.new_empty(spans, batch, heads, shared, head_dim, dtype=torch.float32) for _ in range(2)]
    bias, bias_batch = call.bias_arguments
    tensors = call.query, call.key, call.value, bias, *upstream, *parts
    strides = _strides(call.query, call.key, call.value, upstream.gradient)
    numbers = *upstream.lse.stride()[:2], bias_batch, call.shift, call.group
    places = sizes.before, sizes.image, shared, sizes.first_query, sizes.queries, span, call.scale * LOG2_E
    _launch(
        "shared_key_gradients", call, (spans * -(-shared // TILE_ROWS), heads), *tensors, *strides, *numbers, *places
    )
    return parts[0].sum(dim=0), parts[1].sum(dim=0)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@functools.cache
def load_kernels() -> Any:
    """Return the module of the kernels."""
    if interpreter.is_requested():
        interpreter.mend()
    return importlib.import_module("clear_attn.backends.triton.kernels")


def constants(kernel_configuration: Configuration, head_dim: int, has_bias: bool) -> dict[str, Any]:
    """Return the values that a kernel is compiled for."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": 2 ** math.ceil(math.log2(head_dim)),
        "M": kernel_configuration.rows,
        "N": kernel_configuration.columns,
        "TILE_PARTS": TILE_ROWS // kernel_configuration.rows,
        "BLOCK_PARTS": BLOCK_KEYS // kernel_configuration.columns,
        "HAS_BIAS": has_bias,
        "PRECISION": "ieee",
    }


def _launch(name: str, call: Call, tiles_and_heads: tuple[int, int], *arguments: Any) -> None:
    """Run a kernel, with one program per part of a tile."""
    device, head_dim = call.query.device, call.query.shape[-1]
    found = architecture(device)
    chosen = configuration(found, name, head_dim)
    tiles, heads = tiles_and_heads
    grid = tiles * (TILE_ROWS // chosen.rows), heads, call.query.shape[0]
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with on_device:
            fixed = constants(chosen, head_dim, call.key_bias is not None)
            getattr(load_kernels(), name)[grid](*arguments, **fixed, **chosen.options)
    except Exception as error:
        raise RuntimeError(
            f"the Triton kernel {name!r} failed on {found} with {chosen}, head_dim {head_dim}: {error}; use "
            "backend='auto' or 'tiled'"
        ) from error
