"""Split the calls of a linearized transformer over ranks in its entry hook, and gather the output."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clear_attn.backends.selection import BACKENDS
from clear_attn.core.layout import Images, TokenLayout
from clear_attn.methods import Method
from clear_attn.models import ModelAdapter
from clear_attn.models._diffusers import hooks_in, is_first_block_cache
from clear_attn.models.hooked import InnerHook, OutputHook
from clear_attn.models.qwen_image import join_positions
from clear_attn.models.sd3 import into_tile_order
from clear_attn.parallel.communicator import Communicator
from clear_attn.parallel.consistency import check_same
from clear_attn.parallel.shard import Shard
from clear_attn.parallel.sharded_attention import ShardedPlan
from clear_attn.parallel.weights_digest import WeightsDigest
from clear_attn.utils._torch import leaves_of

# The shard of the running call, for hooks inside the transformer; the layout owns it.
_shard: contextvars.ContextVar[weakref.ref[Shard] | None] = contextvars.ContextVar("clear_attn_shard", default=None)


def _current() -> Shard | None:
    reference = _shard.get()
    return None if reference is None else reference()


class RankSharder:
    """Split calls over ranks, see `clear_attn.patching.hooks.Sharder`.

    Args:
        communicator: the communicator of the ranks.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.ranks = communicator.ranks
        self.gathers: dict[Images, Gather] = {}  # one hook each, by which a transformer's is found
        self.weights = WeightsDigest()

    def __deepcopy__(self, memo: object) -> RankSharder:
        return self

    def shard(self, transformer: Any, call: dict[str, Any], layout: TokenLayout, settings: str) -> Shard:
        """Return this rank's shard of a call.

        Raises:
            RuntimeError: gradients are needed; FirstBlockCache is on; a rank does not answer.
            ValueError: ranks were given different calls or hold different weights; there are more ranks than tile rows.
        """
        tensors = [*leaves_of(call), *transformer.parameters()]
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
            raise RuntimeError(
                "a transformer that is split over ranks gives no gradients; call it under torch.no_grad(), or "
                "clear_attn.deparallelize() it to train"
            )
        if any(is_first_block_cache(hook) for hook in hooks_in(transformer)):
            raise RuntimeError(
                "FirstBlockCache skips steps by the values of a rank's own tokens, so ranks would skip others; call "
                "disable_cache() on the transformer, or remove the hooks of apply_first_block_cache()"
            )
        weights = self.weights.lines(transformer)
        check_same(self.communicator, call, f"grids {layout.grids}, {settings}", weights)
        key = self.communicator.rank, self.ranks
        if key not in layout.shards:
            layout.shards[key] = Shard(layout, *key)
        shard: Shard = layout.shards[key]
        _shard.set(weakref.ref(shard))
        return shard

    def check_weights(self, transformer: Any) -> None:
        """Raise ValueError if ranks hold different weights."""
        check_same(self.communicator, {}, "no call", self.weights.lines(transformer))

    def agree_on_backend(self, selected: str) -> str:
        """Return the backend that all ranks selected or, if they differ, the one that runs everywhere."""
        own = torch.tensor(list(BACKENDS).index(selected), device="cpu")
        return selected if (self.communicator.compare(own) == own).all() else "tiled"

    def plan(self, method: Method, shard: Shard) -> ShardedPlan:
        """Return the plan of a method on a rank's part of a layout."""
        return ShardedPlan(shard, method.halo(), method.pooled_factor or 1, self.communicator)

    def inner_hooks(self, adapter: ModelAdapter, transformer: Any) -> list[InnerHook]:
        """Return hooks that select the rank's tokens after the model permutes them, and gather the output."""
        inside = [(inner.module, TAKE.get(inner.hook)) for inner in adapter.inner_hooks(transformer)]
        entrances = [OutputHook(module, take) for module, take in inside if take]
        last: Any = adapter.output_layer(transformer)  # `parallelize` refuses a model without one
        if adapter.output_images not in self.gathers:
            self.gathers[adapter.output_images] = Gather(self.communicator, adapter.output_images)
        return [*entrances, OutputHook(last, self.gathers[adapter.output_images])]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def take_shard(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Select the rank's tokens, in a forward hook after the one that permutes them into tile order."""
    shard = _current()
    return output if shard is None else output[:, shard.in_whole]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def take_positions(module: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Select the rank's positions, in a forward hook after the one that joins those of text and image in tile order."""
    shard = _current()
    if shard is None:
        return output
    text = shard.text_tokens
    return tuple(torch.cat([part[:text], part[text:][shard.in_whole]]) for part in output)


# By hook of an adapter, the hook after it that selects the rank's tokens.
TAKE: dict[Callable[..., Any], Callable[..., Any]] = {into_tile_order: take_shard, join_positions: take_positions}


class Gather:
    """A forward hook that concatenates the image tokens of all ranks.

    Args:
        communicator: of the ranks.
        images: those that the module's output has.
    """

    def __init__(self, communicator: Communicator, images: Images) -> None:
        self.communicator, self.images = communicator, images

    def __deepcopy__(self, memo: object) -> Gather:
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shard = _current()
        _shard.set(None)
        part = shard.of_images(self.images) if shard else None
        if part is None:
            return output
        # A joint sequence holds all tokens, as keys do; in some models text tokens are only keys, not queries.
        image = output[:, part.image_keys] if output.shape[1] == part.tokens else output
        return torch.cat(self.communicator.all_gather(image.contiguous(), part.counts, dim=1)(), dim=1)
