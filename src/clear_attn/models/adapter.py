"""The contract of a model adapter, which describes one transformer class: its calls, layers and projections."""

from __future__ import annotations

import abc
import contextlib
import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import Images, TokenLayout
from clear_attn.methods import Layer, Method
from clear_attn.models._diffusers import require_diffusers
from clear_attn.models.class_names import DIFFUSERS, class_of
from clear_attn.models.context.context import ClearContext
from clear_attn.models.hooked import InnerHook
from clear_attn.models.image_to_image import HighresPipelines
from clear_attn.models.pipeline_defaults import linear_shift
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs, project, project_out
from clear_attn.models.training import TrainingAdapter


class Call(NamedTuple):
    """The tokens of one call of a transformer.

    Attributes:
        grids: (height, width) in tokens of each image in the sequence.
        text_tokens: the number of tokens off the grid: text, and learned padding.
        device: the device of the image tokens.
        padding_tokens: how many of the text tokens, those next to the image, are learned padding of the image.
    """

    grids: tuple[Grid, ...]
    text_tokens: int
    device: torch.device
    padding_tokens: int = 0


class Architecture(NamedTuple):
    """A published size of a transformer class.

    Attributes:
        name: the name for `clear-attn cost --model`.
        config: the entries that differ from the transformer's default config.
        first_version: the first version of diffusers that has these entries.
    """

    name: str
    config: Mapping[str, Any] = MappingProxyType({})
    first_version: tuple[int, int] = (0, 36)

    def check_version(self) -> None:
        """Check that the installed version of diffusers has a transformer of this size.

        Raises:
            TypeError: the version is older than `first_version`.
        """
        require_diffusers(self.name, self.first_version)


class ModelAdapter(abc.ABC):
    """Describe one transformer class: its calls, layers and projections.

    An adapter has no state; the state of a call is in its context. Classes of diffusers are given by name, because
    importing one imports the transformers of all models.

    Attributes:
        transformer_class: the name of the transformer class.
        packages: the top-level packages that define the classes named here.
        accepts: names of the attention processors that can be replaced.
        ip_adapter_processors: names of processors with an IP-Adapter; the replacement keeps the adapter's attention.
        first_version: the first version of diffusers in which a model of this class is supported.
        text_first: whether text comes before the image in the joint sequence.
        text_queries: whether text queries attend to all tokens. If not, text tokens are keys alone: `project` returns
            the image's query, and computes the attention of text by itself.
        default_text_tokens: the default length of the text sequence in its pipelines.
        vae_scale_factor: pixels per latent, for a transformer without a pipeline.
        residuals: the keywords of a ControlNet's residuals, lists of `[batch, image tokens, channels]`.
        fused_qkv_reliable: whether a layer with `fused_projections` has fused weights equal to the separate ones.
        activation_factor: estimated peak memory of a forward pass, as a multiple of tokens x heads x head_dim elements;
            measured on a CPU.
        keywords: the argument of a call whose entries the model passes on to its attention layers.
        timestep_is_sigma: whether sigma can be computed from a call's timestep.
        takes_scale: whether the scores of its dense layers can be scaled, see `proportional_attention`.
        output_images: the images that the output has.
        training: the training adapter, not inherited; None if the model cannot be distilled.
        highres_pipelines: the pipelines of `highres`, not inherited; none if it does not support the model.
        architectures: published sizes for `clear-attn cost --model`, not inherited.
    """

    transformer_class: str
    packages: tuple[str, ...] = DIFFUSERS
    first_version: tuple[int, int] = (0, 36)
    accepts: tuple[str, ...]
    ip_adapter_processors: tuple[str, ...] = ()
    text_first: bool
    text_queries: bool = True
    default_text_tokens: int
    vae_scale_factor: int = 8
    residuals: tuple[str, ...] = ()
    fused_qkv_reliable: bool = True
    activation_factor: int = 20
    keywords: str = "joint_attention_kwargs"
    timestep_is_sigma: bool = True
    takes_scale: bool = False
    output_images: Images = Images()
    training: TrainingAdapter | None = None
    highres_pipelines: tuple[HighresPipelines, ...] = ()
    architectures: tuple[Architecture, ...] = ()

    def __init_subclass__(cls) -> None:
        # A subclass inherits calls and layers, but these three describe one model only.
        for name in ("training", "highres_pipelines", "architectures"):
            if name not in vars(cls):
                setattr(cls, name, getattr(ModelAdapter, name))

    def check_version(self) -> None:
        """Check that the installed version of diffusers supports this model.

        Raises:
            TypeError: the version is older than `first_version`.
        """
        if self.packages == DIFFUSERS:
            require_diffusers(f"a {self.transformer_class}", self.first_version)

    # Layers

    def attention_layers(self, transformer: Any) -> dict[str, Any]:
        """Return the attention modules whose processors are replaced, by name."""
        return {
            key.removesuffix(".processor"): transformer.get_submodule(key.removesuffix(".processor"))
            for key in transformer.attn_processors
        }

    def has_text(self, transformer: Any, layer: str) -> bool:
        """Return whether text takes part in the attention of the layer of this name."""
        return True

    def images_of(self, transformer: Any, layer: str) -> Images:
        """Return the images that take part in the attention of the layer of this name."""
        return Images()

    def describe_layers(self, transformer: Any) -> dict[str, Layer]:
        """Return the properties of each attention layer that methods depend on, by name."""
        counters: defaultdict[Any, Iterator[int]] = defaultdict(itertools.count)
        described = {}
        for name, attn in self.attention_layers(transformer).items():
            has_text, images = self.has_text(transformer, name), self.images_of(transformer, name)
            number = next(counters[has_text, images])
            described[name] = Layer(name, number, has_text, *self.heads_of(attn), images)
        return described

    def heads_of(self, attn: Any) -> tuple[int, int]:
        """Return the number of query heads of a layer, and the channels per head."""
        return attn.heads, attn.inner_dim // attn.heads

    def make_processor(self, original: Any, method: Method, layer: Layer, group: int) -> ClearAttnProcessor:
        """Return the processor that replaces a layer's original one."""
        return self.processor_class(layer.name)(self, method, layer, group)

    def processor_class(self, layer: str) -> type[ClearAttnProcessor]:
        """Return the processor class whose `__call__` has the signature that the layer of this name uses."""
        return ClearAttnProcessor

    def project(self, attn: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Return query, key and value `[batch, heads, tokens, head_dim]`, and any value that `project_out` needs."""
        return *project(attn, inputs, self.text_first, self.takes_fused(attn)), None  # type: ignore[return-value]

    def project_out(self, attn: Any, joint: Tensor, inputs: Inputs, rest: Any) -> Any:
        """Return the layer's output, given its attention output `[batch, tokens, heads x head_dim]`."""
        return project_out(attn, joint, inputs, self.text_first)

    def takes_fused(self, attn: Any) -> bool:
        """Return whether a layer computes query, key and value with one fused projection."""
        return self.fused_qkv_reliable and bool(attn.fused_projections)

    # Calls

    def bind_call(self, transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, including keywords that the class's `forward` does not have.

        Raises:
            TypeError: an argument is missing or repeated.
        """
        # Caches and hooks set a `forward` with any signature on the instance, so read the class's.
        cls: Any = class_of(transformer, (self.transformer_class,), self.packages) or type(transformer)
        signature = inspect.signature(cls.forward)
        known = {name: value for name, value in kwargs.items() if name in signature.parameters}
        bound = signature.bind(transformer, *args, **known).arguments
        without_self = dict(itertools.islice(bound.items(), 1, None))
        return {**without_self, **{name: value for name, value in kwargs.items() if name not in known}}

    @abc.abstractmethod
    def latents_per_token(self, transformer: Any) -> int:
        """Return the side of a token in latent pixels."""

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        """Return the hooks inside the transformer, for changes that its entry hook cannot make."""
        return []

    def carry(self, transformer: Any, context: ClearContext) -> Any:
        """Return the value to put into the call's attention keywords, so that the layers get the context."""
        return context

    def end_call(self) -> None:
        """Undo what `carry` did outside the call's keywords."""
        return

    def release(self, transformer: Any) -> None:
        """Undo what `carry` changed in the transformer; called by `restore`."""
        return

    @abc.abstractmethod
    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        """Return the grids and the text length of a call.

        Raises:
            ValueError: the keywords of the call contradict each other.
        """

    def image_input(self, kwargs: Mapping[str, Any]) -> Tensor:
        """Return a tensor of the call's image, which has the dtype of its layers."""
        tokens: Tensor = kwargs["hidden_states"]
        return tokens

    def padded(self, grid: Grid, text_tokens: int) -> tuple[int, int]:
        """Return the length of a text after the model has padded it, and the number of the image's padding tokens."""
        return text_tokens, 0

    def text_bias(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return the bias of padded text keys and the weight of text queries, see `ScoreBias.on_plan`.

        Raises:
            ValueError: the mask's shape does not match the text.
        """
        return None, None

    def sigma(self, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the sigma of each image of a call, the share of noise from 0 to 1, `[batch]` or one number.

        Raises:
            ValueError: sigma cannot be computed from the timestep.
        """
        timestep: Tensor = kwargs["timestep"]
        return timestep

    def timestep_settings(self, pipe: Any, tokens: int, steps: int) -> dict[str, Any]:
        """Return the keywords with which the model's pipelines call `set_timesteps` of their scheduler.

        Args:
            pipe: a pipeline with a scheduler.
            tokens: the number of image tokens.
            steps: the number of steps of the run.
        """
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": linear_shift(pipe.scheduler.config, tokens)}

    def check_residuals(self, kwargs: Mapping[str, Any], tokens: int) -> None:
        """Raise ValueError if a ControlNet's residuals do not have this number of image tokens."""
        for name in self.residuals:
            for residual in kwargs.get(name) or ():
                if residual.shape[1] != tokens:
                    raise ValueError(
                        f"{name} must have a residual for each of {tokens} image tokens, got {residual.shape[1]}; "
                        "give the ControlNet the image's own height and width"
                    )

    def permute_residuals(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Return the keywords with a ControlNet's residuals in tile order."""
        given = [name for name in self.residuals if kwargs.get(name) is not None]
        permuted = {name: [residual[:, layout.permutation] for residual in kwargs[name]] for name in given}
        return {**kwargs, **permuted}

    @abc.abstractmethod
    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Return the keywords with the image tokens, and every tensor with a row per image token, in tile order."""

    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        """Return the transformer's output in raster order. By default it is `[batch, image tokens, channels]`."""
        return sample[:, layout.inverse_permutation]

    # The model

    def output_layer(self, transformer: Any) -> nn.Module | None:
        """Return the last module, whose output has a row per image token, or None if the model has no such module."""
        return getattr(transformer, "proj_out", None)

    def rotary_embedding(self, transformer: Any) -> Any | None:
        """Return the rotary embedding, which has a `theta`, or None."""
        return None

    @contextlib.contextmanager
    def scaled_theta(self, transformer: Any, factor: float) -> Iterator[None]:
        """Multiply theta of the rotary embedding for a `with` block. By default the embedding reads it in each call.

        Override it for an embedding with tables that are made from theta.
        """
        embedding: Any = self.rotary_embedding(transformer)
        before = embedding.theta
        embedding.theta = before * factor
        try:
            yield
        finally:
            embedding.theta = before

    def max_grid_side(self, transformer: Any) -> int | None:
        """Return the largest number of rows or columns of tokens that have a position, or None for no limit."""
        return None
