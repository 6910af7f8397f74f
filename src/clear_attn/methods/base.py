"""What another method of attention than CLEAR has to tell: its processors, and what they cost."""

from __future__ import annotations

import abc
import ast
import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from clear_attn.core.layout import Grid, TokenLayout
from clear_attn.models.padding import Padding
from clear_attn.models.processors import AttnProcessor
from clear_attn.utils.validation import Config, check_whole_number

# By the name that files know them by.
_METHODS: dict[str, type[Any]] = {}


class Method(abc.ABC):
    """A way for image queries to attend: a frozen dataclass, made without arguments or with its own settings.

    Text queries see all tokens in every method, as in CLEAR.

    Attributes:
        quadratic: what of its work, if anything, grows with the square of the tokens, for reports.
        takes_scale: whether a factor of the scores changes what image queries see.
    """

    quadratic: ClassVar[str | None]
    takes_scale: ClassVar[bool] = True
    # As a layout's config: image queries see what the method says, and no window or pooled keys of CLEAR.
    window: ClassVar[float] = math.inf
    down_factor: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        _METHODS[_name(cls)] = cls  # a class that is defined anew, as in a notebook, takes the old one's place

    @abc.abstractmethod
    def processor(self, attn: Any, layer: str, number: int) -> MethodProcessor:
        """The processor of one attention layer.

        Args:
            attn: the layer, which has `heads` and `inner_dim`.
            layer: its name.
            number: its place among the attention layers of its kind, with text or without, from 0.

        Raises:
            ValueError: the settings do not fit the layer.
        """

    @abc.abstractmethod
    def work(self, grid: Grid, text_tokens: int, heads: int, head_dim: int, number: int) -> dict[str, int]:
        """The FLOPs of the image queries of the layer of this number for one picture, by kind.

        Each multiplication and addition of matrix products and convolutions counts.
        """

    def prepare(self, layout: TokenLayout) -> Any:
        """What the layers need of a layout, made once for all of them and kept in `layout.prepared`.

        A compiled layer cannot make it.

        Raises:
            ValueError: the method cannot attend in such a layout.
        """
        if len(layout.grids) > 1:
            raise ValueError(
                f"{type(self).__name__} attends in one picture, and this call brings {len(layout.grids)} (references "
                "count); draw without them, or use CLEAR"
            )
        return ()

    def settings(self) -> dict[str, Any]:
        """Name and fields, for a file."""
        return {"name": _name(type(self)), "settings": dataclasses.asdict(self)}  # type: ignore[call-overload]

    def as_text(self) -> str:
        """What `parse` reads."""
        return as_text(self.settings())

    def check(self) -> None:
        """Raises TypeError for one that is no frozen dataclass, or that a file cannot hold."""
        try:
            hash(self)
            found = named(json.loads(json.dumps(self.settings())))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"method {type(self).__name__} must be a frozen dataclass of numbers, texts and the like, which JSON "
                f"can hold, with a processor and work: {error}"
            ) from None
        if found != self:
            raise TypeError(f"method {self} does not come back the same from a file: {found}; give it plain fields")

    def _keep_whole(self, field: str, remedy: str, least: int = 1) -> None:
        """Checks that a field is a whole number, and keeps it as Python's own int."""
        object.__setattr__(self, field, check_whole_number(field, getattr(self, field), remedy, least))


class MethodProcessor(AttnProcessor):
    """Attention of one layer by a method: `forward` is that of the image queries.

    Args:
        method: its settings.
        layer: the layer's name, for errors.
    """

    def __init__(self, method: Method, layer: str = "") -> None:
        super().__init__(layer)
        self.method = method

    @abc.abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float) -> Tensor:
        """Attention of the image queries.

        Args:
            query: `[batch, heads, image tokens, head_dim]`, in tile order.
            key, value: `[batch, heads, tokens, head_dim]` of text and image, joined as the layout says.
            layout: where the tokens stand, of one grid.
            scale: the usual factor of scores.

        Returns:
            As the query.
        """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        backend: str,
        sharpness: float = 1.0,
        padding: Padding | None = None,
    ) -> Tensor:
        if padding is not None:
            raise RuntimeError(f"{self._where} cannot leave out padding in the text; give the text without padding")
        if sharpness != 1 and not self.method.takes_scale:
            raise RuntimeError(f"{self._where} has no scores to sharpen; leave proportional_attention() out")
        scale = sharpness * query.shape[-1] ** -0.5
        if layout.config is None:
            joint = self._text_attention(query, key, value, scale)
        else:
            joint = layout.among_tokens(self.as_module(query[:, :, layout.image], key, value, layout, scale))
            if layout.text_tokens:
                joint[:, :, layout.text] = self._text_attention(query[:, :, layout.text], key, value, scale)
        return joint.transpose(1, 2).flatten(2, 3)

    def fits(self, config: Config) -> bool:
        return config == self.method

    def extra_repr(self) -> str:
        return repr(self.method)


def _name(method: type[Method]) -> str:
    """The library's own by their class's name, others with their module's."""
    own = method.__module__.startswith(f"{__package__}.")
    return method.__name__ if own else f"{method.__module__}.{method.__qualname__}"


def named(settings: Mapping[str, Any]) -> Method:
    """The method that `Method.settings` wrote down.

    Raises:
        ValueError: no method of that name has been defined, or it takes other settings.
    """
    name, fields = settings["name"], settings["settings"]
    if name not in _METHODS:
        raise ValueError(f"no method of attention is named {name!r}, but {_known()}; import the file that defines it")
    method = _METHODS[name]
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        made: Method = method(**fields)
    except TypeError as error:
        own = ", ".join(field.name for field in dataclasses.fields(method)) or "none"
        raise ValueError(f"{name} does not take these settings ({error}); it has: {own}") from error
    return made


def as_text(settings: Mapping[str, Any]) -> str:
    """What `Method.settings` wrote down, in one line; the method need not be known."""
    fields = ", ".join(f"{key}={value!r}" for key, value in settings["settings"].items())
    return f"{settings['name']}({fields})"


def parse(text: str) -> Method:
    """The method that a text stands for: a name, with settings where it has them, as `"Swin(side=8)"`.

    Raises:
        ValueError: it does not read so; no method of that name, or several; settings that it does not take.
    """
    try:
        call: Any = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        name = ast.unparse(call.func)
        fields = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        if call.args or None in fields:
            raise ValueError
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(f"method={text!r} is no name with settings in brackets; write it as 'Swin(side=8)'") from None
    fitting = [known for known in _METHODS if known == name or known.endswith(f".{name}")]
    if name in fitting or len(fitting) == 1:
        name = name if name in fitting else fitting[0]
    elif fitting:
        raise ValueError(f"method={text!r} may be any of {', '.join(fitting)}; write its whole name")
    return named({"name": name, "settings": fields})


def _known() -> str:
    return ", ".join(sorted(name for name, method in _METHODS.items() if not inspect.isabstract(method)))
