"""Support for models that pass no attention keywords to their layers: the layers read the context from a variable."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clear_attn.models.context import context_variable
from clear_attn.models.context.context import ClearContext
from clear_attn.models.context.context_checkpoint import unwrap_checkpointing, wrap_checkpointing
from clear_attn.models.context.context_variable import PUBLISHED, PublishedContext
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs


class Publishing:
    """The shared part of such models' adapters. It goes before the model's adapter in the list of bases."""

    def carry(self, transformer: Any, context: ClearContext) -> PublishedContext:
        """Publish a context until the object returned here, which the call's keywords hold, is dropped."""
        wrap_checkpointing(transformer)
        return context_variable.publish(context)

    def end_call(self) -> None:
        """End the publication."""
        context_variable.clear()

    def release(self, transformer: Any) -> None:
        """Remove the wrapper of the checkpointing function."""
        unwrap_checkpointing(transformer)

    def processor_class(self, layer: str) -> type[ClearAttnProcessor]:
        """Return the processor that reads the published context."""
        return PublishedProcessor


class PublishedProcessor(ClearAttnProcessor):
    """The processor of layers that may get no context; it uses the published one."""

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
