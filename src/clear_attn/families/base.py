"""What a family of transformers has to tell: where its attention is, and how a call goes in and comes out."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clear_attn.layout import Grid, TokenLayout


class Call(NamedTuple):
    """What the door reads from one call of a transformer."""

    grids: tuple[Grid, ...]
    text_tokens: int
    device: torch.device


class Family(abc.ABC):
    """One family. Stateless: what differs from call to call travels in the call's keywords."""

    name: str
    transformer_class: type
    stock_processors: tuple[type, ...]
    text_first: bool

    def attention_layers(self, transformer: Any) -> dict[str, Any]:
        """The attention modules by name, those whose processors are replaced."""
        return {
            key.removesuffix(".processor"): transformer.get_submodule(key.removesuffix(".processor"))
            for key in transformer.attn_processors
        }

    @abc.abstractmethod
    def new_processor(self, down_factor: int, layer: str) -> nn.Module:
        """The processor for a layer."""

    @abc.abstractmethod
    def read(self, kwargs: dict[str, Any]) -> Call:
        """Reads the grids and the text length from a call's keywords; raises ValueError where they do not fit."""

    @abc.abstractmethod
    def enter(self, kwargs: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """The keywords with the image tokens, and all that runs beside them, in tile order."""

    @abc.abstractmethod
    def leave(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        """The transformer's output in raster order."""
