"""The autoencoder on one rank, for all."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from clear_attn.models._diffusers import remove_hook
from clear_attn.parallel.communicator import Links
from clear_attn.parallel.consistency import check_same

logger = logging.getLogger(__name__)

NAME = "clear_attn_decode"


class DecodeOnOneRank(ModelHook):
    """In a decoder: the first rank decodes, and the others are given what comes of it.

    Args:
        links: to the other ranks.
        applies: tells whether calls are split at present; where not, every rank decodes for itself.
    """

    def __init__(self, links: Links, applies: Callable[[], bool]) -> None:
        super().__init__()
        self.links = links
        self.applies = applies

    def __deepcopy__(self, memo: object) -> DecodeOnOneRank:
        return self

    def new_forward(self, module: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        decode = self.fn_ref.original_forward
        if not self.applies():
            return decode(sample, *args, **kwargs)
        # Also finds out ranks that do not come to the end in the same step.
        check_same(self.links, {"the latents to decode": sample}, "decoding of the latents")
        return self.links.broadcast(lambda: decode(sample, *args, **kwargs), sample.device)


def decode_on_one_rank(vae: Any, links: Links, applies: Callable[[], bool]) -> None:
    decode_everywhere(vae)
    HookRegistry.check_if_exists_or_initialize(vae.decoder).register_hook(DecodeOnOneRank(links, applies), NAME)
    logger.info("rank 0 of %d decodes the latents, for all", links.ranks)


def decode_everywhere(vae: Any) -> None:
    remove_hook(vae.decoder, NAME)


def weakly(transformer: Any, is_split: Callable[[Any], bool]) -> Callable[[], bool]:
    """Whether a transformer is split, asked without keeping it alive."""
    reference = weakref.ref(transformer)

    def applies() -> bool:
        there = reference()
        return there is not None and is_split(there)

    return applies
