"""FlexAttention over the layout's block lists: the default on CUDA where no gradient is asked for.

On a CPU, FlexAttention gives silently wrong results as a part of a larger compiled graph, for views that the
graph made (seen in torch 2.13). There it therefore stands behind a custom operator, compiled by itself, which an
outer graph takes as it is.
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
from clear_attn.core.layout import Neighbourhood
from clear_attn.core.window_mask import BLOCK, BlockLists, Points, visible
from clear_attn.utils._torch import has_triton, mark_static, recompile_limit

# Positions in a table on the CPU: pictures up to 11,000 pixels square.
TABLE_LENGTH = 2**19
MOST_COMPILATIONS = 64
# What the A100 has (163 KiB to a block), rounded; RTX cards have 99 or less.
LEAST_SHARED_MEMORY = 160 * 1024


def reason_against(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """Why FlexAttention cannot serve a call here, or None where it can."""
    if device.type == "cpu" and needs_grad:
        return "FlexAttention has no gradients on a CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes no {dtype}"
    if device.type == "cuda" and head_dim < 16:
        return f"FlexAttention takes no head_dim below 16 on CUDA, got {head_dim}"
    return reason_against_device(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def reason_against_device(device: torch.device) -> str | None:
    """Why FlexAttention cannot serve a device of this machine, or None where it can."""
    return _look_for_tools(device)


@functools.cache
def _look_for_tools(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if has_triton() else "it needs Triton and a GPU that Triton supports"
    if device.type == "cpu":
        if sys.platform not in ("linux", "win32"):
            return f"torch has no FlexAttention for CPUs on {sys.platform}"
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return "this CPU lacks AVX2"
        # The compilers that torch looks for.
        compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
        if shutil.which(compiler) is None:
            return f"it needs a C++ compiler, and {compiler!r} was not found"
        return None
    return f"FlexAttention is not tried on devices of type {device.type!r}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def reason_for_doubt(device: torch.device) -> str | None:
    """Why a device that FlexAttention may serve is not one to rely on, or None where it is."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "FlexAttention is not tried on ROCm"
    chip: Any = torch.cuda.get_device_properties(device)
    if chip.shared_memory_per_block_optin < LEAST_SHARED_MEMORY:
        return (
            f"{chip.name} gives a kernel {chip.shared_memory_per_block_optin // 1024} KiB of shared memory, where "
            f"FlexAttention is tried with {LEAST_SHARED_MEMORY // 1024} and more"
        )
    return None


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # Sizes are dynamic from the first call on: one compilation serves all pictures and text lengths. Without
    # `fullgraph`, a process that compiles too often would fall back to attention over all pairs in silence.
    return torch.compile(_flex, fullgraph=True, dynamic=True)


def _flex(*args: Any, **kwargs: Any) -> Any:
    # Compilations are counted for each function: those of this one are not mixed with the user's own.
    return flex_attention(*args, **kwargs)


def _run_compiled(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # an outer graph compiles it along, and cannot take the setting below
        return flex_attention(*args, **kwargs)
    # Models differ in dtype, head_dim and scale, and tiny pictures in being a single block: a few more variants than
    # torch's default of 8 allows for.
    with recompile_limit(MOST_COMPILATIONS):
        return _compiled_flex()(*args, **kwargs)


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    seen: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention over block lists; `seen` is what it calls a mask_mod."""
    blocks = BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)),
    )
    wanted = AuxRequest(lse=True) if return_lse else None
    result = _run_compiled(query, key, value, block_mask=blocks, scale=scale, return_aux=wanted)
    return (result[0], result[1].lse) if return_lse else (result, None)


def _rule(query_y: Tensor, query_x: Tensor, key_y: Tensor, key_x: Tensor, reach: Tensor) -> Callable[..., Tensor]:
    def seen(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return visible(
            Points(query_y[query_index], query_x[query_index]),
            Points(key_y[key_index], key_x[key_index]),
            reach[key_index],
        )

    return seen


@torch.library.custom_op("clear_attn::flex_on_cpu", mutates_args=())
def _flex_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, lists: list[Tensor], places: list[Tensor], scale: float
) -> Tensor:
    seen = _rule(*(of_constant_length(place) for place in places))
    tokens = query.shape[2]
    query, key, value = _whole_block(query), _whole_block(key), _whole_block(value)
    with torch.no_grad():
        output, _ = attend_blocks(query, key, value, BlockLists(*lists), seen, scale)
    return output[:, :, :tokens].contiguous()


def _whole_block(x: Tensor) -> Tensor:
    """A contiguous copy, filled up with zeros to at least one block of tokens.

    Contiguous, for every other order of memory would be another compilation. One block, for with fewer tokens
    torch 2.13 computes on a CPU with wrong keys. To the rule, a key that is filled in has no reach.
    """
    batch, heads, tokens, head_dim = x.shape
    copy = x.new_zeros(batch, heads, max(tokens, BLOCK), head_dim)
    copy[:, :, :tokens] = x
    return copy


def of_constant_length(place: Tensor) -> Tensor:
    """Fills a table up to a length that is the same for all but enormous pictures, a constant of the kernel.

    As a variable, its name can be a prefix of one that torch 2.13's CPU template replaces in the code it writes,
    which then does not compile.
    """
    filled = torch.nn.functional.pad(place, (0, -len(place) % TABLE_LENGTH))
    mark_static(filled)
    return filled


@_flex_on_cpu.register_fake
def _(query, key, value, lists, places, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Neighbourhood, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See `clear_attn.backends`.

    On a CPU, where FlexAttention keeps the log-sum-exp to itself, that comes from the tiled backend, at its cost.
    """
    if query.device.type != "cpu":
        return attend_directly(query, key, value, layout, scale, return_lse)
    image = query[:, :, layout.image]
    output = _flex_on_cpu(image, key, value, list(layout.block_lists), _places(layout), scale)
    lse = tiled.attend(query, key, value, layout, scale, True)[1] if return_lse else None
    return layout.among_tokens(output), lse


def attend_directly(
    query: Tensor, key: Tensor, value: Tensor, layout: Neighbourhood, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Without the precautions that a CPU needs."""
    image, seen = query[:, :, layout.image], _rule(*_places(layout))
    output, lse = attend_blocks(image, key, value, layout.block_lists, seen, scale, return_lse)
    return layout.among_tokens(output), None if lse is None else layout.among_tokens(lse)


def _places(layout: Neighbourhood) -> list[Tensor]:
    return [*layout.query, *layout.key, layout.reach]
