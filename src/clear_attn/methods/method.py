"""The contract of an attention method: which keys image queries attend to, what layers learn, what it costs."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends.attention import DenseAttention
from clear_attn.backends.softmax import expand_heads
from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import Images, TokenLayout
from clear_attn.core.plan import Plan
from clear_attn.core.region import expand_to_sequence
from clear_attn.utils.validation import check_whole_number

# Image and text tokens of FLUX.1 at 1024 x 1024 px.
TRAINED_TOKENS = 64 * 64 + 512

# All method classes, by the name that files store.
REGISTRY: dict[str, type[Method]] = {}


def registered_name(method: type[Method]) -> str:
    """Return the name that files store for a method class; classes from other packages include their module."""
    own = method.__module__.startswith(f"{__package__}.")
    return method.__name__ if own else f"{method.__module__}.{method.__qualname__}"


class Layer(NamedTuple):
    """The properties of an attention layer that a method may depend on.

    Attributes:
        name: the layer's name in the model.
        number: the index, from 0, among the layers that attend among the same tokens.
        has_text: whether text takes part in its attention.
        heads: the number of query heads.
        head_dim: the channels per head.
        images: the images that take part in its attention.
    """

    name: str
    number: int = 0
    has_text: bool = True
    heads: int = 1
    head_dim: int = 64
    images: Images = Images()

    @property
    def has_image(self) -> bool:
        """Whether the image itself takes part in its attention, not its references alone."""
        return self.images.first == 0

    @property
    def channels(self) -> int:
        """The number of channels, heads x head_dim."""
        return self.heads * self.head_dim


class ScoreBias(NamedTuple):
    """A bias on the scaled scores of text keys, made once per call and plan.

    Attributes:
        text: the bias of each text key, `[batch, text tokens]`.
        keys: the bias of each key for image queries, `[batch, tokens]`; 0 for image keys.
        text_queries: the bias of each key for text queries, `[batch, 1, text queries or 1, tokens]`.
        weighted: whether each text query has its own bias.
    """

    text: Tensor
    keys: Tensor
    text_queries: Tensor
    weighted: bool

    @classmethod
    def on_plan(cls, plan: Plan, text: Tensor | None, text_query_weight: Tensor | None = None) -> ScoreBias | None:
        """Return the bias on a plan, or None.

        Args:
            plan: the plan of the layers.
            text: the bias of each text key, `[batch, text tokens]`, or None.
            text_query_weight: a factor of the bias for each text query, `[batch, text tokens]`; None for 1.
        """
        if text is None or not plan.text_tokens:
            return None
        keys = text.new_zeros(len(text), plan.text_tokens + plan.image_tokens)
        keys[:, plan.text_keys] = text
        text_queries = keys[:, None, None]
        weighted = text_query_weight is not None
        if text_query_weight is not None:
            text_queries = text_queries * text_query_weight[:, None, :, None]
        return cls(text, keys, text_queries, weighted)

    def before(self, keys: int) -> Tensor:
        """Return the bias `[batch, 1, 1, keys]` of text keys, padded with zeros for the keys after them."""
        return F.pad(self.text, (0, keys - self.text.shape[1]))[:, None, None]


class Options(NamedTuple):
    """The settings of one call's attention.

    Attributes:
        scale: the factor of the scores.
        backend: a backend of `clear_attn.backends`, or "auto".
        dense: a function that computes dense attention with the kernels that the user chose.
        bias: the bias on the scaled scores for padded text, or None.
    """

    scale: float
    backend: str
    dense: DenseAttention
    bias: ScoreBias | None = None


class Method(abc.ABC):
    """The base class of attention methods, which are frozen dataclasses of settings.

    A method decides which keys image queries attend to. Text queries attend to all tokens in every method.

    Attributes:
        quadratic: the part of its work that grows with the square of the tokens, for reports; None if no part does.
        uses_scale: whether a factor of the scores changes the result.
        uses_backends: whether the user can choose one of `clear_attn.backends`.
        supports_bias: whether it can weight or hide padded text keys.
        supports_segments: whether it supports several grids, such as an image and its references.
    """

    quadratic: ClassVar[str | None]
    uses_scale: ClassVar[bool] = True
    uses_backends: ClassVar[bool] = False
    supports_bias: ClassVar[bool] = True
    supports_segments: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        REGISTRY[registered_name(cls)] = cls  # a class that is defined again, as in a notebook, replaces the old one

    def for_layer(self, number: int) -> Method:
        """Return the method for the layer of this number; by default the same for all."""
        return self

    def with_window(self, window: int) -> Method:
        """Return the method with another window.

        Raises:
            ValueError: the method has no window.
        """
        raise ValueError(
            f"layers or steps with a window of their own need CLEAR, and this is {self}; leave windows and "
            "windows_by_sigma out of the schedule"
        )

    def with_settings(self, window: int | None, down_factor: int | None) -> Method:
        """Return the method with CLEAR's settings replaced by those that are not None.

        Raises:
            ValueError: the method does not have a setting that is given.
        """
        for name, given in (("window", window), ("down_factor", down_factor)):
            if given is not None:
                raise ValueError(f"{name}={given} is a setting of CLEAR, and this is {self}; leave it out")
        return self

    @property
    def pooled_factor(self) -> int | None:
        """The side of pooled cells that can be inferred from the method's checkpoints, or None."""
        return None

    @property
    def title(self) -> str:
        """The method's name in model cards."""
        return type(self).__name__

    def purpose(self, model: str) -> str:
        """Return the model card's description of weights distilled for the method."""
        return f"with which {model} attends by `{self}` of clear_attn.methods in place of softmax attention."

    def as_arguments(self) -> str:
        """Return the method as arguments of `clear_attn.linearize`."""
        return f"method={self.as_text()}"

    def plan(self, layout: TokenLayout) -> Plan:
        """Return the index tensors of the method on a layout, made once per layout.

        Raises:
            ValueError: the method cannot attend in such a layout.
        """
        self.validate_layout(layout)
        return Plan(layout)

    def parameters_for(self, layer: Layer) -> dict[str, Tensor]:
        """Return the initial values of a layer's learned parameters, by name.

        Raises:
            ValueError: the settings do not fit the layer.
        """
        return {}

    @abc.abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        """Return the attention of all queries.

        Args:
            query: `[batch, heads, tokens, head_dim]`, text and image joined as in the plan, the image in tile order.
            key, value: `[batch, key heads, tokens, head_dim]`; the key heads divide the query's heads.
            plan: the plan that `plan` made.
            parameters: the layer's parameters, in the order of `parameters_for`.
            options: the settings of the call.

        Returns:
            The attention output, in the shape of the query.

        Raises:
            RuntimeError: the call needs something that the method does not support.
        """

    @abc.abstractmethod
    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        """Return the FLOPs of one layer's image queries for one image, by kind.

        Multiplications and additions of matrix products and convolutions are counted, 2 per multiply-add.
        """

    def covers(self, grid: Grid) -> bool:
        """Return whether every image token attends to every other in an image of this size."""
        return False

    def halo(self) -> float:
        """Return the distance in tokens within which image queries attend to image keys.

        Raises:
            ValueError: the method cannot be split over ranks.
        """
        raise ValueError(f"only CLEAR can be split over ranks, and this is {self}; draw on one GPU")

    def scale_multiplier(self, tokens: int) -> float:
        """Return the factor of the scale in proportional attention, for a number of text and image tokens."""
        return proportional_scale(tokens)

    def validate_backend(self, backend: str) -> None:
        """Raise ValueError for a backend that the method does not use."""
        if backend != "auto" and not self.uses_backends:
            raise ValueError(f"backend={backend!r} is one of CLEAR's, and this is {self}; leave it out")

    def validate_layout(self, layout: TokenLayout) -> None:
        """Raise ValueError if the method cannot attend in a layout."""
        if len(layout.grids) > 1 and not self.supports_segments:
            raise ValueError(
                f"{type(self).__name__} attends in one image, and this call has {len(layout.grids)}, references "
                "included; draw without references, or use CLEAR"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the name and fields, for JSON."""
        return {"name": registered_name(type(self)), "settings": dataclasses.asdict(self)}  # type: ignore[call-overload]

    def as_text(self) -> str:
        """Return the method as text that `parse` reads, such as `Swin(side=8)`."""
        fields = ", ".join(f"{key}={value!r}" for key, value in self.to_dict()["settings"].items())
        return f"{registered_name(type(self))}({fields})"

    def _validate_whole(self, field: str, remedy: str, least: int = 1) -> None:
        """Check that a field is a whole number and store it as a Python int, since NumPy's may overflow."""
        object.__setattr__(self, field, check_whole_number(field, getattr(self, field), remedy, least))


class ImageMethod(Method):
    """A method that implements image queries alone; this class computes dense attention for text queries.

    `attend_image` gets keys and values with as many heads as the query.
    """

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        self._validate_options(query, options)
        key, value = expand_heads(query, key, value)
        image = self.attend_image(query[:, :, plan.image], key, value, plan, parameters, options)
        output = expand_to_sequence(image, plan.tokens, plan.image)
        if plan.text_queries:
            text = query[:, :, plan.text]
            bias = options.bias.text_queries if options.bias else None
            output[:, :, plan.text] = options.dense(text, key, value, options.scale, bias)
        return output

    @abc.abstractmethod
    def attend_image(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        """Return the attention of the image queries, `[batch, heads, image tokens, head_dim]`; see `attend`."""

    def _validate_options(self, query: Tensor, options: Options) -> None:
        if options.bias is not None and not self.supports_bias:
            raise RuntimeError(f"{type(self).__name__} does not support padded text; give the text without padding")
        if not self.uses_scale and options.scale != query.shape[-1] ** -0.5:
            raise RuntimeError(f"{type(self).__name__} has no scores to scale; leave proportional_attention() out")


def proportional_scale(tokens: int) -> float:
    """Return sqrt(log(tokens) / log(4608)), which keeps the entropy of attention close to training (arXiv 2306.08645).

    FLUX.1 has 4608 tokens at 1024 x 1024 px: 64 x 64 image tokens and 512 text tokens.
    """
    return math.sqrt(math.log(tokens) / math.log(TRAINED_TOKENS))


def known_methods() -> list[str]:
    """Return the names of all methods that are defined, except private and abstract ones."""
    return sorted(
        name for name, method in REGISTRY.items() if not inspect.isabstract(method) and not name.startswith("_")
    )
