"""The `flex` backend: FlexAttention over a plan's block indices.

On a CPU, FlexAttention inside a larger compiled graph gives wrong results for views that the graph makes, without an
error (torch 2.13). On CPUs it is therefore compiled alone, inside a custom operator.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from clear_attn.backends import tiled
from clear_attn.backends.derivatives import needs_grad, validate_derivatives
from clear_attn.backends.softmax import expand_heads
from clear_attn.core.region import AttentionRegion
from clear_attn.core.window_mask import BLOCK, BlockIndices, Coordinates, in_window
from clear_attn.utils._torch import has_triton, mark_static, recompile_limit

# The length of coordinate tables on a CPU, enough for images of 11,000 x 11,000 pixels.
TABLE_LENGTH = 2**19
MOST_COMPILATIONS = 64
# GPU kernels need head_dim in multiples of this.
BIAS_DIMS = 8
# An A100 has 163 KiB per block, RTX cards 99 KiB or less.
LEAST_SHARED_MEMORY = 160 * 1024


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """Return why FlexAttention cannot run a call, or None if it can."""
    if device.type == "cpu" and needs_grad:
        return "FlexAttention has no gradients on a CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes no {dtype}"
    if device.type == "cuda" and head_dim < 16:
        return f"FlexAttention takes no head_dim below 16 on CUDA, got {head_dim}"
    return unsupported_device(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unsupported_device(device: torch.device) -> str | None:
    """Return why FlexAttention cannot run on a device of this machine, or None if it can."""
    return _unsupported_device(device)


@functools.cache
def _unsupported_device(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if has_triton() else "it needs Triton and a GPU that Triton supports"
    if device.type == "cpu":
        if sys.platform not in ("linux", "win32"):
            return f"torch has no FlexAttention for CPUs on {sys.platform}"
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return "this CPU lacks AVX2"
        # torch looks for the same compilers.
        compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
        if shutil.which(compiler) is None:
            return f"it needs a C++ compiler, and {compiler!r} was not found"
        return None
    return f"FlexAttention is not tested on devices of type {device.type!r}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def untested_reason(device: torch.device) -> str | None:
    """Return why FlexAttention may fail on a device that it supports, or None if it is tested there."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "FlexAttention is not tested on ROCm"
    chip: Any = torch.cuda.get_device_properties(device)
    if chip.shared_memory_per_block_optin < LEAST_SHARED_MEMORY:
        return (
            f"{chip.name} gives a kernel {chip.shared_memory_per_block_optin // 1024} KiB of shared memory, where "
            f"FlexAttention is tested with {LEAST_SHARED_MEMORY // 1024} and more"
        )
    return None


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # With dynamic sizes, one compilation serves all image sizes and text lengths. Without `fullgraph`, a process that
    # compiles too often would fall back to attention over all pairs without a warning.
    return torch.compile(_flex, fullgraph=True, dynamic=True)


def _flex(*args: Any, **kwargs: Any) -> Any:
    # torch counts recompilations per function, so this one keeps them apart from the user's own.
    return flex_attention(*args, **kwargs)


def _run_compiled(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # an outer graph compiles it too, and cannot trace the setting below
        return flex_attention(*args, **kwargs)
    # Models differ in dtype, head_dim and scale, and tiny images have a single block: more variants than torch's
    # default limit of 8.
    with recompile_limit(MOST_COMPILATIONS):
        return _compiled_flex()(*args, **kwargs)


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockIndices,
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute FlexAttention over block lists with a rule."""
    lengths = query.shape[2], key.shape[2]
    mask = _new_block_mask(lists, mask_mod, lengths, with_gradients=needs_grad(query, key, value))
    return _attend_mask(query, key, value, mask, scale, return_lse)


def _new_block_mask(
    lists: BlockIndices, mask_mod: Callable[..., Tensor], lengths: tuple[int, int], with_gradients: bool
) -> BlockMask:
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=lengths, compute_q_blocks=with_gradients
    )


def block_mask(region: AttentionRegion, with_gradients: bool) -> BlockMask:
    """Return the block mask of a plan, made once for all its layers."""
    masks = region.block_masks
    if with_gradients in masks:
        return masks[with_gradients]
    lengths = region.image_tokens, region.key_tokens
    mask = _new_block_mask(region.block_indices, _mask_mod(*_rule_tensors(region)), lengths, with_gradients)
    if not torch.compiler.is_compiling():  # tensors of a graph cannot be cached
        masks[with_gradients] = mask
    return mask


def prepare(region: AttentionRegion) -> None:
    """Build the index tensors that compiled layers cannot; on a CPU, the operator makes the block mask from them."""
    with torch.inference_mode(False):
        if region.device.type == "cpu":
            _ = region.block_indices
        else:
            block_mask(region, torch.is_grad_enabled())


def _attend_mask(
    query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    wanted = AuxRequest(lse=True) if return_lse else None
    grouped = query.shape[1] != key.shape[1]
    result = _run_compiled(query, key, value, block_mask=blocks, scale=scale, return_aux=wanted, enable_gqa=grouped)
    return (result[0], result[1].lse) if return_lse else (result, None)


def _mask_mod(
    query_y: Tensor, query_x: Tensor, key_y: Tensor, key_x: Tensor, radius_sq: Tensor
) -> Callable[..., Tensor]:
    def mask_mod(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return in_window(
            Coordinates(query_y[query_index], query_x[query_index]),
            Coordinates(key_y[key_index], key_x[key_index]),
            radius_sq[key_index],
        )

    return mask_mod


@torch.library.custom_op("clear_attn::flex_on_cpu", mutates_args=())
def _flex_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, lists: list[Tensor], places: list[Tensor], scale: float
) -> Tensor:
    mask_mod = _mask_mod(*(of_constant_length(place) for place in places))
    tokens = query.shape[2]
    query, key, value = _whole_block(query), _whole_block(key), _whole_block(value)
    with torch.no_grad():
        output, _ = attend_blocks(query, key, value, BlockIndices(*lists), mask_mod, scale)
    return output[:, :, :tokens].contiguous()


def _whole_block(x: Tensor) -> Tensor:
    """Return a contiguous copy, padded with zeros to at least one block of tokens.

    Each other memory layout would need another compilation. With less than one block, torch 2.13 uses wrong keys on a
    CPU. The rule excludes padded keys, because their radius_sq is 0.
    """
    batch, heads, tokens, head_dim = x.shape
    copy = x.new_zeros(batch, heads, max(tokens, BLOCK), head_dim)
    copy[:, :, :tokens] = x
    return copy


def of_constant_length(place: Tensor) -> Tensor:
    """Pad a table to a multiple of `TABLE_LENGTH`, so that its length is a constant of the kernel.

    A variable length can get a name that is a prefix of another name which torch 2.13's CPU template replaces. The
    generated code then does not compile.
    """
    padded = torch.nn.functional.pad(place, (0, -len(place) % TABLE_LENGTH))
    mark_static(padded)
    return padded


@_flex_on_cpu.register_fake
def _(query, key, value, lists, places, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: AttentionRegion,
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `clear_attn.backends`.

    FlexAttention does not return the log-sum-exp on a CPU, so there the tiled backend computes it, at its full cost.
    """
    validate_derivatives("flex", query, key, value)
    if query.device.type != "cpu":
        return attend_directly(query, key, value, region, key_bias, scale, return_lse)
    lse = tiled.attend(query, key, value, region, key_bias, scale, True)[1] if return_lse else None
    key, value = expand_heads(query, key, value)
    image, key, value = append_bias_dims(query[:, :, region.image], key, value, key_bias, scale)
    output = _flex_on_cpu(image, key, value, list(region.block_indices), _rule_tensors(region), scale)
    return region.expand_to_sequence(output[..., : query.shape[-1]]), lse


def attend_directly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: AttentionRegion,
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Call FlexAttention without the workarounds for CPUs."""
    image, key, value = append_bias_dims(query[:, :, region.image], key, value, key_bias, scale)
    mask = block_mask(region, needs_grad(query, key, value))
    output, lse = _attend_mask(image, key, value, mask, scale, return_lse)
    output = region.expand_to_sequence(output[..., : query.shape[-1]])
    return output, None if lse is None else region.expand_to_sequence(lse)


def append_bias_dims(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Append dimensions to query, key and value, so that the scores include a bias per key.

    The dot product over the new dimensions is the bias, so the kernel needs neither a mask nor a score_mod.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`.
        key_bias: `[batch, keys]`; None returns the tensors unchanged.
        scale: the factor of the scores.
    """
    if key_bias is None:
        return query, key, value
    unscaled = key_bias.float() / scale
    # Split into two numbers, because one in half precision would round the bias.
    high = unscaled.to(key.dtype)
    parts = torch.stack([high, (unscaled - high.float()).to(key.dtype)], dim=-1)
    key_dims = torch.nn.functional.pad(parts, (0, BIAS_DIMS - 2))[:, None].expand(-1, key.shape[1], -1, -1)
    ones = query.new_ones(*query.shape[:3], BIAS_DIMS)
    return torch.cat([query, ones], -1), torch.cat([key, key_dims], -1), torch.nn.functional.pad(value, (0, BIAS_DIMS))


def _rule_tensors(region: AttentionRegion) -> list[Tensor]:
    return [*region.query, *region.key, region.radius_sq]
