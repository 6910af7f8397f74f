"""diffusers' FluxPipeline with another default text length."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers

# The captions that the small FLUX was trained on are shorter.
TEXT_TOKENS = 32


def _signature(method: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a method with the text length of the small FLUX as its default."""
    signature = inspect.signature(method)
    parameters = {**signature.parameters}
    parameters["max_sequence_length"] = parameters["max_sequence_length"].replace(default=TEXT_TOKENS)
    return signature.replace(parameters=list(parameters.values()))


class FluxPipeline(diffusers.FluxPipeline):
    """A FluxPipeline that pads prompts to 32 tokens by default, instead of 512.

    It has the name of diffusers' class, so diffusers loads what it saves, and makes other pipelines from it.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{"max_sequence_length": TEXT_TOKENS, **kwargs})

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return super().encode_prompt(*args, **{"max_sequence_length": TEXT_TOKENS, **kwargs})

    # Read by this library and by `help`.
    __call__.__signature__ = _signature(diffusers.FluxPipeline.__call__)  # type: ignore[attr-defined]
    encode_prompt.__signature__ = _signature(diffusers.FluxPipeline.encode_prompt)  # type: ignore[attr-defined]
