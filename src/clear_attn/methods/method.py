"""The contract of a method of attention: what image queries attend to, what layers learn, and what it costs."""

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
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import Plan
from clear_attn.core.region import expand_to_sequence
from clear_attn.utils.validation import check_whole_number

# FLUX.1's at 1024 x 1024 px: image tokens and text tokens.
TRAINED_TOKENS = 64 * 64 + 512

# By the name that files know them by.
REGISTRY: dict[str, type[Method]] = {}


def registered_name(method: type[Method]) -> str:
    """Return the name by which files know a method: the library's own by class, others with their module."""
    own = method.__module__.startswith(f"{__package__}.")
    return method.__name__ if own else f"{method.__module__}.{method.__qualname__}"


class Layer(NamedTuple):
    """An attention layer, as far as a method depends on it.

    Attributes:
        name: in the model.
        number: its place among the attention layers of its kind, with text or without, from 0.
        has_text: whether text takes part in its attention.
        heads: the number of query heads.
        head_dim: channels of a head.
    """

    name: str
    number: int = 0
    has_text: bool = True
    heads: int = 1
    head_dim: int = 64

    @property
    def channels(self) -> int:
        """heads x head_dim."""
        return self.heads * self.head_dim


class ScoreBias(NamedTuple):
    """What is added to the scaled scores of text keys, made once per call and plan.

    Attributes:
        text: `[batch, text tokens]`, for each text key.
        keys: `[batch, tokens]`, for each text and image key, as image queries attend to them; image keys have 0.
        text_queries: the same for text queries, `[batch, 1, text tokens or 1, tokens]`.
        weighted: whether text queries differ from image queries, and from each other.
    """

    text: Tensor
    keys: Tensor
    text_queries: Tensor
    weighted: bool

    @classmethod
    def on_plan(cls, plan: Plan, text: Tensor | None, text_query_weight: Tensor | None = None) -> ScoreBias | None:
        """Return the bias on a plan, or None.

        Args:
            plan: of the layers.
            text: `[batch, text tokens]`, for each text key; None for none.
            text_query_weight: `[batch, text tokens]`, multiplies the bias for each text query; None for 1.
        """
        if text is None or not plan.text_tokens:
            return None
        keys = text.new_zeros(len(text), plan.tokens)
        keys[:, plan.text] = text
        text_queries = keys[:, None, None]
        weighted = text_query_weight is not None
        if text_query_weight is not None:
            text_queries = text_queries * text_query_weight[:, None, :, None]
        return cls(text, keys, text_queries, weighted)

    def before(self, keys: int) -> Tensor:
        """Return the bias `[batch, 1, 1, keys]` of text keys followed by others, which have 0."""
        return F.pad(self.text, (0, keys - self.text.shape[1]))[:, None, None]


class Options(NamedTuple):
    """What one call asks of a layer's attention beyond query, key and value.

    Attributes:
        scale: factor of the scores.
        backend: of `clear_attn.backends`, or "auto".
        dense: computes dense attention, with the kernels that the user chose.
        bias: added to the scaled scores, because of padded text; None for none.
    """

    scale: float
    backend: str
    dense: DenseAttention
    bias: ScoreBias | None = None


class Method(abc.ABC):
    """A way for image queries to attend: a frozen dataclass of settings.

    Text queries attend to all tokens in every method.

    Attributes:
        quadratic: what of its work, if anything, grows with the square of the tokens, for reports.
        uses_scale: whether a factor of the scores changes the result.
        uses_backends: whether it computes with one of `clear_attn.backends` of the user's choice.
        supports_bias: whether it can weigh or hide padded text keys.
        supports_segments: whether it can attend among several grids, as reference images are.
    """

    quadratic: ClassVar[str | None]
    uses_scale: ClassVar[bool] = True
    uses_backends: ClassVar[bool] = False
    supports_bias: ClassVar[bool] = True
    supports_segments: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        REGISTRY[registered_name(cls)] = cls  # a class that is defined again, as in a notebook, replaces the old one

    def for_layer(self, number: int) -> Method:
        """Return the method of the layer of this number, if layers differ."""
        return self

    def with_window(self, window: int) -> Method:
        """Return the method with another window.

        Raises:
            ValueError: it has no window.
        """
        raise ValueError(f"layers with a window of their own need CLEAR, and this is {self}; leave windows out")

    def with_settings(self, window: int | None, down_factor: int | None) -> Method:
        """Return the method with the settings of CLEAR that are given.

        Raises:
            ValueError: it does not have them.
        """
        for name, given in (("window", window), ("down_factor", down_factor)):
            if given is not None:
                raise ValueError(f"{name}={given} is a setting of CLEAR, and this is {self}; leave it out")
        return self

    @property
    def pooled_factor(self) -> int | None:
        """The side of the pooled cells that checkpoints of the method show, or None if it has none such."""
        return None

    @property
    def title(self) -> str:
        """The name that model cards give the method."""
        return type(self).__name__

    def purpose(self, model: str) -> str:
        """Return what a model card says of weights that were distilled for the method."""
        return f"with which {model} attends by `{self}` of clear_attn.methods in place of softmax attention."

    def as_arguments(self) -> str:
        """Return the method as arguments of `clear_attn.linearize`."""
        return f"method={self.as_text()}"

    def plan(self, layout: TokenLayout) -> Plan:
        """Return the index tensors that its layers need of a layout, made once per layout.

        Raises:
            ValueError: the method cannot attend in such a layout.
        """
        self.validate_layout(layout)
        return Plan(layout)

    def parameters_for(self, layer: Layer) -> dict[str, Tensor]:
        """Return the initial values of what a layer learns, by name.

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
            key, value: likewise, with as many heads or a divisor of them.
            plan: as `plan` made it.
            parameters: of the layer, in the order of `parameters_for`.
            options: of the call.

        Returns:
            As the query.

        Raises:
            RuntimeError: the call asks for what the method cannot do.
        """

    @abc.abstractmethod
    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        """Return the FLOPs of the image queries of one layer for one image, by kind.

        Each multiplication and addition of matrix products and convolutions counts.
        """

    def covers(self, grid: Grid) -> bool:
        """Return whether every image token attends to every other in an image of this size."""
        return False

    def halo(self) -> float:
        """Return how far in tokens an image query attends to image keys, for a split over ranks.

        Raises:
            ValueError: the method is not split over ranks.
        """
        raise ValueError(f"only CLEAR is split over ranks, and this is {self}; draw on one")

    def scale_multiplier(self, tokens: int) -> float:
        """Return what proportional attention multiplies the scale with, for a number of text and image tokens."""
        return proportional_scale(tokens)

    def validate_backend(self, backend: str) -> None:
        """Raise ValueError for a backend that the method does not use."""
        if backend != "auto" and not self.uses_backends:
            raise ValueError(f"backend={backend!r} is one of CLEAR's, and this is {self}; leave it out")

    def validate_layout(self, layout: TokenLayout) -> None:
        """Raise ValueError if the method cannot attend in a layout."""
        if len(layout.grids) > 1 and not self.supports_segments:
            raise ValueError(
                f"{type(self).__name__} attends in one image, and this call brings {len(layout.grids)} (references "
                "count); draw without them, or use CLEAR"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the name and fields, for JSON."""
        return {"name": registered_name(type(self)), "settings": dataclasses.asdict(self)}  # type: ignore[call-overload]

    def as_text(self) -> str:
        """Return the text that `parse` reads, as `Swin(side=8)`."""
        fields = ", ".join(f"{key}={value!r}" for key, value in self.to_dict()["settings"].items())
        return f"{registered_name(type(self))}({fields})"

    def _validate_whole(self, field: str, remedy: str, least: int = 1) -> None:
        """Check that a field is a whole number, and keep it as Python's own int: NumPy's may overflow."""
        object.__setattr__(self, field, check_whole_number(field, getattr(self, field), remedy, least))


class ImageMethod(Method):
    """A method that computes image queries apart: text queries are dense attention, and done here.

    Keys and values come with as many heads as the query.
    """

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        self._validate_options(query, options)
        key, value = expand_heads(query, key, value)
        image = self.attend_image(query[:, :, plan.image], key, value, plan, parameters, options)
        output = expand_to_sequence(image, plan.tokens, plan.image)
        if plan.text_tokens:
            text = query[:, :, plan.text]
            bias = options.bias.text_queries if options.bias else None
            output[:, :, plan.text] = options.dense(text, key, value, options.scale, bias)
        return output

    @abc.abstractmethod
    def attend_image(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        """Return the attention of the image queries `[batch, heads, image tokens, head_dim]`, as `attend`."""

    def _validate_options(self, query: Tensor, options: Options) -> None:
        if options.bias is not None and not self.supports_bias:
            raise RuntimeError(
                f"{type(self).__name__} cannot leave out padding in the text; give the text without padding"
            )
        if not self.uses_scale and options.scale != query.shape[-1] ** -0.5:
            raise RuntimeError(f"{type(self).__name__} has no scores to scale; leave proportional_attention() out")


def proportional_scale(tokens: int) -> float:
    """Return sqrt(log(tokens) / log(4608)), which keeps the entropy of attention about as in training.

    4608 are FLUX.1's tokens at 1024 x 1024 px, 64 x 64 of the image and 512 of the text (arXiv 2306.08645).
    """
    return math.sqrt(math.log(tokens) / math.log(TRAINED_TOKENS))


def known_methods() -> list[str]:
    """Return the names of all methods that were defined."""
    return sorted(
        name for name, method in REGISTRY.items() if not inspect.isabstract(method) and not name.startswith("_")
    )
