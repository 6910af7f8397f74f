"""What splits the calls of a linearized transformer over ranks: the tokens at its door, and the picture at its end."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clear_attn.core.layout import TokenLayout
from clear_attn.models import ModelAdapter
from clear_attn.models.adapter import InnerHook
from clear_attn.models.conflicts import hooks_of_diffusers
from clear_attn.models.qwen_image import join_positions
from clear_attn.models.sd3 import into_tile_order
from clear_attn.parallel.communicator import Links
from clear_attn.parallel.consistency import check_same
from clear_attn.parallel.shard import Share
from clear_attn.parallel.sharded_attention import ParallelAttention

# The share of the call that runs, for the hooks inside the transformer.
_share: contextvars.ContextVar[Share | None] = contextvars.ContextVar("clear_attn_share", default=None)


@functools.lru_cache(maxsize=8)
def share_for(layout: TokenLayout, rank: int, ranks: int, attention: ParallelAttention) -> Share:
    """The share, made once for all calls with a layout."""
    return Share(layout, rank, ranks, attention)


class Split:
    """Splits calls over ranks, see `clear_attn.patching.hooks.Spread`.

    Args:
        links: to the other ranks.
    """

    def __init__(self, links: Links) -> None:
        self.links = links
        self.ranks = links.ranks
        self.attention = ParallelAttention(links)
        self.gather = Gather(links)

    def __deepcopy__(self, memo: object) -> Split:
        return self

    def share(self, transformer: Any, call: dict[str, Any], layout: TokenLayout, settings: str) -> Share:
        """The rank's share of a call.

        Raises:
            RuntimeError: gradients are asked for; FirstBlockCache is on; a rank does not answer.
            ValueError: ranks were given different calls; more ranks than tile rows.
        """
        tensors = [*tree_leaves(call), *transformer.parameters()]
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
            raise RuntimeError(
                "a transformer that is split over ranks gives no gradients; call it under torch.no_grad(), or "
                "clear_attn.deparallelize() it to train"
            )
        if any(isinstance(hook, FBCHeadBlockHook) for hook in hooks_of_diffusers(transformer)):
            raise RuntimeError(
                "FirstBlockCache skips steps by the values of a rank's own tokens, so ranks would part; call "
                "disable_cache() on the transformer, or take off what apply_first_block_cache() put on"
            )
        check_same(self.links, call, f"grids {layout.grids}, {settings}")
        share = share_for(layout, self.links.rank, self.links.ranks, self.attention)
        _share.set(share)
        return share

    def inner_hooks(self, family: ModelAdapter, transformer: Any) -> list[InnerHook]:
        """Takes the rank's tokens where all are put into tile order inside; gathers all behind the last layer."""
        inside = [(door.module, TAKE.get(door.hook)) for door in family.inner_hooks(transformer)]
        entrances = [InnerHook(module, take) for module, take in inside if take]
        return [*entrances, InnerHook(transformer.proj_out, self.gather)]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def take_share(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook behind the one that puts tokens into tile order."""
    share = _share.get()
    return output if share is None else output[:, share.in_whole]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def take_positions(module: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """A forward hook behind the one that joins the positions of text and image tokens, in tile order."""
    share = _share.get()
    if share is None:
        return output
    text = share.text_tokens
    return tuple(torch.cat([part[:text], part[text:][share.in_whole]]) for part in output)


# Behind which hooks of families the rank's tokens are taken.
TAKE: dict[Callable[..., Any], Callable[..., Any]] = {into_tile_order: take_share, join_positions: take_positions}


class Gather:
    """A forward hook: all ranks' tokens, one rank's after the other's."""

    def __init__(self, links: Links) -> None:
        self.links = links

    def __deepcopy__(self, memo: object) -> Gather:
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        share = _share.get()
        _share.set(None)
        return output if share is None else torch.cat(self.links.gather(output, share.counts, dim=1)(), dim=1)
