"""What another method of attention than CLEAR has to tell: its processors, and what they cost."""

from __future__ import annotations

import abc
import ast
import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from clear_attn.config import Config
from clear_attn.layout import Grid, TokenLayout
from clear_attn.padding import Padding
from clear_attn.processors import AttnProcessor


class Method(abc.ABC):
    """A way for image queries to attend. A frozen dataclass, made without arguments or with its own settings.

    Text queries see all tokens in every method, as in CLEAR.

    Subclasses are found by their class's name when weights are loaded that were distilled for one.
    """

    # As a layout's config: image queries see what the method says, and no window or pooled keys of CLEAR.
    window: ClassVar[float] = math.inf
    down_factor: ClassVar[int] = 1

    @abc.abstractmethod
    def processor(self, attn: Any, layer: str, number: int) -> MethodProcessor:
        """The processor of one attention layer.

        Args:
            attn: the layer, which has `heads` and `inner_dim`.
            layer: its name.
            number: its place among the attention layers, from 0.

        Raises:
            ValueError: the settings do not fit the layer.
        """

    @abc.abstractmethod
    def work(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        """The FLOPs of one layer's image queries for one picture, by kind; each multiplication and addition counts.

        A method whose layers differ counts the mean of them.
        """

    def prepare(self, layout: TokenLayout) -> None:
        """Makes what the layers need of a layout, before the first of them runs, and leaves it in `layout.prepared`.

        A compiled layer cannot make it.

        Raises:
            ValueError: the method cannot attend in such a layout.
        """
        if len(layout.grids) > 1:
            raise ValueError(
                f"{type(self).__name__} attends in one picture, and this call brings {len(layout.grids)} (references "
                "count); draw without them, or use CLEAR"
            )

    def settings(self) -> dict[str, Any]:
        """Name and fields, for a file."""
        return {"name": type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]


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


def named(settings: Mapping[str, Any]) -> Method:
    """The method of a name, with its fields.

    Raises:
        ValueError: no method of that name has been defined, or it has other fields.
    """
    known = _methods()
    name = settings["name"]
    if name not in known:
        raise ValueError(
            f"no method of attention is named {name!r}, but {', '.join(sorted(known))}; import the file that defines it"
        )
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    del fields["name"]
    try:
        return known[name](**fields)
    except TypeError as error:
        raise ValueError(f"{name} does not take these settings: {error}; update clear_attn") from error


def parse(text: str) -> Method:
    """The method that a text stands for: a name, with settings where it has them, as `"Swin(side=8)"`.

    Raises:
        ValueError: it does not read so; no method of that name; settings out of range, or that it does not have.
    """
    try:
        call: Any = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        name, fields = call.func.id, {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        if call.args:
            raise ValueError
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(f"method={text!r} is no name with settings in brackets; write it as 'Swin(side=8)'") from None
    return named({**fields, "name": name})


def _methods() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    waiting: list[Any] = Method.__subclasses__()  # mypy takes no abstract class for a value
    while waiting:
        method = waiting.pop()
        waiting += method.__subclasses__()
        if not inspect.isabstract(method):
            found[method.__name__] = method
    return found
