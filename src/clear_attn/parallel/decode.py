"""Decode latents on the first rank, and send the image to the others."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from clear_attn.models._diffusers import remove_hook
from clear_attn.parallel.communicator import Communicator
from clear_attn.parallel.consistency import check_same
from clear_attn.patching.target import entry_hook_of

logger = logging.getLogger(__name__)

NAME = "clear_attn_decode"


class DecodeOnOneRank(ModelHook):
    """A hook on a decoder: the first rank decodes and sends the image to the others.

    Args:
        communicator: the communicator of the ranks.
        transformer: the transformer. Without a sharder in its entry hook, every rank decodes for itself.
    """

    def __init__(self, communicator: Communicator, transformer: Any) -> None:
        super().__init__()
        self.communicator = communicator
        self.transformer = weakref.ref(transformer)

    def __deepcopy__(self, memo: object) -> DecodeOnOneRank:
        return self

    def new_forward(self, module: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        decode, transformer = self.fn_ref.original_forward, self.transformer()
        hook = None if transformer is None else entry_hook_of(transformer)
        if hook is None or hook.sharder is None:
            return decode(sample, *args, **kwargs)
        # This also finds ranks with another number of steps.
        check_same(self.communicator, {"the latents to decode": sample}, "decoding of the latents")
        return self.communicator.broadcast(lambda: decode(sample, *args, **kwargs), sample.device)


def decode_on_one_rank(vae: Any, communicator: Communicator, transformer: Any) -> None:
    """Install the hook, and remove an earlier one."""
    decode_on_every_rank(vae)
    hook = DecodeOnOneRank(communicator, transformer)
    HookRegistry.check_if_exists_or_initialize(vae.decoder).register_hook(hook, NAME)
    logger.info("rank 0 of %d decodes the latents for all", communicator.ranks)


def decode_on_every_rank(vae: Any) -> None:
    """Remove the hook."""
    remove_hook(vae.decoder, NAME)
