"""Models that pass no attention keywords to their layers: these read the context from a context variable."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clear_attn.models.context import context_variable
from clear_attn.models.context.context import ClearContext
from clear_attn.models.context.context_checkpoint import unwrap_checkpointing, wrap_checkpointing
from clear_attn.models.context.context_variable import PUBLISHED, PublishedContext
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs


class Publishing:
    """What adapters of such models share; a base before the model's own."""

    def carry(self, transformer: Any, context: ClearContext) -> PublishedContext:
        """Publish a context for as long as the call's keywords hold what is returned."""
        wrap_checkpointing(transformer)
        return context_variable.publish(context)

    def end_call(self) -> None:
        """Publish nothing."""
        context_variable.clear()

    def release(self, transformer: Any) -> None:
        """Take the wrapper off the checkpointing function."""
        unwrap_checkpointing(transformer)

    def processor_class(self, layer: str) -> type[ClearAttnProcessor]:
        """Return the processor that reads the published context."""
        return PublishedProcessor


class PublishedProcessor(ClearAttnProcessor):
    """For layers that may get no context: it attends with the published one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_context: Any = None,
    ) -> Any:
        inputs = Inputs(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.run(attn, inputs, PUBLISHED)
