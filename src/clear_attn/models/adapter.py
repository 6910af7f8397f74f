"""The contract of a model file: where attention is, and how a call is parsed, permuted and undone."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clear_attn.core.layout import Grid, TokenLayout
from clear_attn.models.padding import Padding
from clear_attn.models.processors import ClearAttnProcessor
from clear_attn.models.training import TrainingAdapter


class Call(NamedTuple):
    """What the door reads from one call of a transformer."""

    grids: tuple[Grid, ...]
    text_tokens: int
    device: torch.device


class HighresPipelines(NamedTuple):
    """The pipelines that `highres` runs for a transformer class.

    Attributes:
        text_to_image, image_to_image: names of diffusers classes with the same components.
        batched_guidance: whether guidance runs two images in one forward pass.
    """

    text_to_image: str
    image_to_image: str
    batched_guidance: bool = False


class Architecture(NamedTuple):
    """A published size of a transformer class.

    Attributes:
        name: as `clear-attn cost --model` takes it.
        config: what differs from the transformer's default config.
    """

    name: str
    config: Mapping[str, Any] = MappingProxyType({})


class InnerHook(NamedTuple):
    """A hook inside a transformer: on a module's output, or before it runs, with its keywords."""

    module: nn.Module
    hook: Callable[..., Any]
    before: bool = False

    def installed(self) -> bool:
        """Whether the hook is in place."""
        hooks = self.module._forward_pre_hooks if self.before else self.module._forward_hooks
        return any(hook is self.hook for hook in hooks.values())


class ModelAdapter(abc.ABC):
    """All that is known of one transformer class. Stateless: what differs by call is in the call's keywords.

    Classes of diffusers are named, not imported: importing one imports the transformers of all models.

    Attributes:
        transformer_class: the name of its transformers' class in diffusers.
        accepts: names of the attention processors that CLEAR's can replace.
        ip_adapter_processors: names of those with an IP-Adapter, whose own attention the replacement keeps.
        text_first: whether text comes before the image where they are joined.
        default_text_tokens: the length of the text sequence that its pipelines make unless told otherwise.
        residuals: the keywords that bring a ControlNet's residuals, lists of `[batch, image tokens, channels]`.
        only_attends: whether its layers do nothing but project, attend and project, so that other methods than CLEAR
            may stand in.
        fused_qkv_reliable: whether a layer with `fused_projections` has fused weights equal to the separate ones.
        activation_factor: likely peak of a forward pass in tokens x (heads x head_dim) elements, measured on a CPU.
        keywords: the argument of a call that holds what is passed on to the attention layers.
        timestep_is_sigma: whether sigma follows from a call's timestep.
        training: what distillation needs; None for a model that cannot be distilled.
        highres_pipelines: what `highres` runs; None for a model that it does not support.
        architectures: published sizes, of which `clear-attn cost --model` tells the cost.
    """

    transformer_class: str
    accepts: tuple[str, ...]
    ip_adapter_processors: tuple[str, ...] = ()
    text_first: bool
    default_text_tokens: int
    residuals: tuple[str, ...] = ()
    only_attends: bool = False
    fused_qkv_reliable: bool = True
    activation_factor: int = 20
    keywords: str = "joint_attention_kwargs"
    timestep_is_sigma: bool = True
    training: TrainingAdapter | None = None
    highres_pipelines: HighresPipelines | None = None
    architectures: tuple[Architecture, ...] = ()

    def attention_layers(self, transformer: Any) -> dict[str, Any]:
        """The attention modules by name, those whose processors are replaced."""
        return {
            key.removesuffix(".processor"): transformer.get_submodule(key.removesuffix(".processor"))
            for key in transformer.attn_processors
        }

    def has_text(self, transformer: Any, layer: str) -> bool:
        """Whether text takes part in the attention of the layer of this name."""
        return True

    def new_processor(self, down_factor: int, layer: str) -> ClearAttnProcessor:
        """The processor for a layer."""
        return ClearAttnProcessor(down_factor, layer)

    def stand_in(self, stock: Any, down_factor: int, layer: str) -> ClearAttnProcessor:
        """The processor for a layer that has one of the stock processors or adapters."""
        return self.new_processor(down_factor, layer)

    @abc.abstractmethod
    def latents_per_token(self, transformer: Any) -> int:
        """The side of a token in pixels of the latent picture."""

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        """What has to be changed inside, where the transformer's entrance does not reach."""
        return []

    def publish(self, own: dict[str, Any] | None) -> None:
        """Tells the layers of a call's own keywords, where the transformer does not; None when the call is over."""
        return

    @abc.abstractmethod
    def parse_call(self, transformer: Any, kwargs: dict[str, Any]) -> Call:
        """Reads the grids and the text length from a call's keywords; raises ValueError where they do not fit."""

    def padding(self, kwargs: dict[str, Any], layout: TokenLayout) -> Padding | None:
        """What a call says of padding in its text; raises ValueError where that does not fit."""
        return None

    def sigma(self, kwargs: dict[str, Any]) -> Tensor:
        """The share of noise in each picture of a call, 0 to 1, as its timestep tells: `[batch]` or one number.

        Raises ValueError where it does not.
        """
        timestep: Tensor = kwargs["timestep"]
        return timestep

    def check_residuals(self, kwargs: dict[str, Any], tokens: int) -> None:
        """Raises ValueError where a ControlNet's residuals are not for so many image tokens."""
        for name in self.residuals:
            for residual in kwargs.get(name) or ():
                if residual.shape[1] != tokens:
                    raise ValueError(
                        f"{name} must have a residual for each of {tokens} image tokens, got {residual.shape[1]}; "
                        "give the ControlNet the picture's own height and width"
                    )

    def permute_residuals(self, kwargs: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """The keywords with a ControlNet's residuals in tile order."""
        given = [name for name in self.residuals if kwargs.get(name) is not None]
        return {**kwargs, **{name: [residual[:, layout.order] for residual in kwargs[name]] for name in given}}

    @abc.abstractmethod
    def permute_inputs(self, kwargs: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """The keywords with the image tokens, and all that runs beside them, in tile order."""

    @abc.abstractmethod
    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        """A tensor of the transformer's output in raster order."""

    def rotary_embedding(self, transformer: Any) -> Any | None:
        """Return the module whose `theta` is read in each call, or None for a model without such an embedding."""
        return None

    def max_grid_side(self, transformer: Any) -> int | None:
        """Return the most rows or columns of tokens that have a position, or None without a limit."""
        return None
