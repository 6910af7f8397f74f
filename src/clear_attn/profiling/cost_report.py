"""The work of one forward pass, dense and linearized, as numbers and as a report."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clear_attn.core.layout import Grid
from clear_attn.core.window_mask import BLOCK
from clear_attn.methods import Method
from clear_attn.profiling.memory import Memory


def window_pairs(grid: Grid, window: int) -> int:
    """Number of (query, key) pairs of image tokens with dy^2 + dx^2 < window^2, the disc clipped at the border.

    Each offset (dy, dx) of the disc occurs (height - |dy|) (width - |dx|) times.
    """
    height, width = grid
    total = 0
    for dy in range(-min(window, height) + 1, min(window, height)):
        reach = window**2 - dy**2
        across = sum((width - abs(dx)) for dx in range(-min(window, width) + 1, min(window, width)) if dx * dx < reach)
        total += (height - abs(dy)) * across
    return total


class Place(NamedTuple):
    """Of a layer: its number among those of its kind, and whether that has text."""

    number: int
    has_text: bool


class OwnWindow(NamedTuple):
    """Layers with a window of their own.

    Attributes:
        window: in tokens, or None where they are dense.
        layers, layers_without_text: how many.
    """

    window: int | None
    layers: int
    layers_without_text: int


@dataclass(frozen=True)
class Cost:
    """The attention of one forward pass of a transformer.

    FLOPs count a multiplication and an addition each: 4 x visible pairs x (heads x head_dim) for a layer, as in
    CLEAR's table 2; other methods count their own. They leave out projections and all else that a layer does, which
    linearizing does not change.

    Attributes:
        height, width (`int`): of the grid, in tokens.
        text_tokens, batch (`int`): numbers of text tokens and pictures.
        layers (`int`): attention layers in which text takes part.
        inner_dim (`int`): heads x head_dim.
        window, down_factor (`int`): of CLEAR.
        layers_without_text (`int`): attention layers in which the image tokens stand alone.
        own_windows (`OwnWindow`s): which of the layers have another window than the others, by a schedule.
        dense_above (`float`, *optional*): the share of noise above which a call is dense, by a schedule. All other
            numbers are of a call that is not.
        controlnets: of each ControlNet in the pipeline, the FLOPs of its attention, dense and as it is; not part of
            the other numbers.
        memory (`Memory`, *optional*): of the weights, of a forward pass, and of decoding.
        heads (`int`): into which inner_dim is divided.
        method (`Method`, *optional*): what attends in place of CLEAR; numbers of pairs are CLEAR's alone then.
        method_places (`Place`s): the layers in which it does.
    """

    height: int
    width: int
    text_tokens: int
    batch: int
    layers: int
    inner_dim: int
    window: int
    down_factor: int
    layers_without_text: int = 0
    own_windows: tuple[OwnWindow, ...] = ()
    dense_above: float | None = None
    controlnets: tuple[tuple[int, int], ...] = ()
    memory: Memory | None = None
    heads: int = 1
    method: Method | None = None
    method_places: tuple[Place, ...] = ()

    @property
    def image_tokens(self) -> int:
        return self.height * self.width

    @property
    def pooled_tokens(self) -> int:
        f = self.down_factor
        return -(-self.height // f) * -(-self.width // f) if f > 1 else 0

    @property
    def window_pairs(self) -> int:
        if self.method:
            raise ValueError(f"{self.method} has no window; look at own_layer_work()")
        return window_pairs((self.height, self.width), self.window)

    @property
    def pooled_pairs(self) -> int:
        """Pairs of image queries and pooled keys: they grow with the square of the image tokens."""
        return self.image_tokens * self.pooled_tokens

    @property
    def pairs(self) -> int:
        """Pairs of query and key that are visible to each other in a layer of CLEAR with text."""
        text = self.text_tokens * (self.text_tokens + 2 * self.image_tokens)
        return text + self.window_pairs + self.pooled_pairs

    @property
    def dense_pairs(self) -> int:
        return (self.text_tokens + self.image_tokens) ** 2

    def flops(self, pairs: int) -> int:
        """FLOPs of so many pairs."""
        return 4 * pairs * self.inner_dim

    def layer_work(self, window: int | None, text_tokens: int) -> dict[str, int]:
        """FLOPs of one layer with this window (None: dense) and so much text, for one picture, by kind."""
        image = self.image_tokens
        seen = image**2 if window is None else window_pairs((self.height, self.width), window)
        pairs = {
            "text queries, all keys": text_tokens * (text_tokens + image),
            "image queries, text keys": image * text_tokens,
            "image queries, image keys": seen,
            "image queries, pooled keys": 0 if window is None else self.pooled_pairs,
        }
        return {kind: self.flops(number) for kind, number in pairs.items()}

    def method_work(self) -> list[dict[str, int]]:
        """FLOPs of each layer in which a method attends, for one picture, by kind."""
        assert self.method
        works = []
        for number, has_text in self.method_places:
            text = self.text_tokens if has_text else 0
            of_text = {"text queries, all keys": self.flops(text * (text + self.image_tokens))}
            grid, head_dim = (self.height, self.width), self.inner_dim // self.heads
            works.append({**of_text, **self.method.work(grid, text, self.heads, head_dim, number)})
        return works

    def own_layer_work(self) -> dict[str, float]:
        """FLOPs of a linearized layer with text, for one picture, by kind; where such layers differ, their mean."""
        if self.method is None:
            return dict(self.layer_work(self.window, self.text_tokens))
        works = zip(self.method_places, self.method_work(), strict=True)
        with_text = [work for place, work in works if place.has_text]
        return {kind: sum(work[kind] for work in with_text) / len(with_text) for kind in (with_text or [{}])[0]}

    def _layers_flops(self, window: int | None, layers: int, layers_without_text: int) -> int:
        with_text, without = (sum(self.layer_work(window, text).values()) for text in (self.text_tokens, 0))
        return layers * with_text + layers_without_text * without

    @property
    def step_flops(self) -> int:
        """Of all layers and pictures."""
        total, layers, without_text = 0, self.layers, self.layers_without_text
        for own in self.own_windows:
            total += self._layers_flops(*own)
            layers, without_text = layers - own.layers, without_text - own.layers_without_text
        if self.method:
            total += sum(sum(work.values()) for work in self.method_work())
        else:
            total += self._layers_flops(self.window, layers, without_text)
        return self.batch * total

    @property
    def dense_step_flops(self) -> int:
        return self.batch * self._layers_flops(None, self.layers, self.layers_without_text)

    @property
    def layer_gflops(self) -> float:
        return sum(self.own_layer_work().values()) / 1e9

    @property
    def dense_layer_gflops(self) -> float:
        return self.flops(self.dense_pairs) / 1e9

    @property
    def ratio(self) -> float:
        """How many times the linearized work is in the dense work."""
        return self.dense_step_flops / self.step_flops

    @property
    def block_list_bytes(self) -> int:
        """Memory of FlexAttention's block lists, which grow with the square of the tokens, once for all layers."""
        keys = self.text_tokens + self.image_tokens + self.pooled_tokens
        query_blocks, key_blocks = -(-self.image_tokens // BLOCK), -(-keys // BLOCK)
        return 2 * 4 * query_blocks * (key_blocks + 1)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        inputs = {name: getattr(self, name) for name in self.__dataclass_fields__}
        derived = (
            "image_tokens",
            "pooled_tokens",
            "layer_gflops",
            "dense_layer_gflops",
            "ratio",
            "block_list_bytes",
        )
        return {
            **inputs,
            **({"method": self.method.settings(), "window": None, "down_factor": None} if self.method else {}),
            "method_places": len(self.method_places),
            "memory": self.memory.to_dict() if self.memory else None,
            **{name: getattr(self, name) for name in derived},
            "step_gflops": self.step_flops / 1e9,
            "dense_step_gflops": self.dense_step_flops / 1e9,
        }

    def _rows(self) -> list[tuple[str, str, str]]:
        digits = 1 if self.dense_layer_gflops > 10 else 3

        def row(name: str, dense: float, own: float) -> tuple[str, str, str]:
            dense_cell, cell = (f"{flops / 1e9:,.{digits}f}" if flops else "-" for flops in (dense, own))
            return name, dense_cell, cell

        dense, own = self.layer_work(None, self.text_tokens), self.own_layer_work()
        kinds = [
            *((kind, dense.get(kind, 0), own.get(kind, 0)) for kind in {**dense, **own}),
            ("a layer", sum(dense.values()), sum(own.values())),
            *self._own_kinds(),
            (f"all {self.layers + self.layers_without_text} layers", self.dense_step_flops, self.step_flops),
        ]
        rows = [row(*kind) for kind in kinds if any(kind[1:])]
        for number, (dense_net, net) in enumerate(self.controlnets, start=1):
            rows.append(row(f"ControlNet {number}{', dense' if dense_net == net else ''}", dense_net, net))
        return [("GFLOPs of attention", "dense", type(self.method).__name__ if self.method else "CLEAR"), *rows]

    def _own_kinds(self) -> list[tuple[str, int, int]]:
        kinds: list[tuple[str, int, int]] = []
        for window, layers, layers_without_text in self.own_windows:
            number = layers + layers_without_text
            name = f"{number} layer{'s' * (number > 1)}, {f'window {window}' if window else 'dense'}"
            dense, own = (self._layers_flops(each, layers, layers_without_text) for each in (None, window))
            kinds.append((name, dense, own))
        return kinds

    def _heading(self) -> str:
        batch = f", {self.batch} pictures at a time" if self.batch > 1 else ""
        attention = str(self.method) if self.method else f"window {self.window}, down_factor {self.down_factor}"
        return (
            f"{self.height} x {self.width} image tokens, {self.text_tokens} text tokens, {attention}{batch}: "
            f"attention's work falls {self.ratio:.1f} times"
        )

    def _remarks(self) -> list[str]:
        remarks = ["Dense as before: the text queries, and all that is not attention."]
        if self.method and self.method.quadratic:
            remarks.append(f"Still growing with the square of the tokens: {self.method.quadratic}.")
        if not self.method:
            quadratic = [f"FlexAttention's block lists ({self.block_list_bytes / 2**20:.1f} MiB in all)"]
            if self.pooled_tokens:
                quadratic.append(f"attention to the {self.pooled_tokens:,} pooled keys")
            remarks.append(f"Still growing with the square of the tokens: {' and '.join(quadratic)}.")
        if self.dense_above is not None:
            remarks.append(f"Steps above {self.dense_above:g} of noise are dense; this counts one of the others.")
        if any(dense == own for dense, own in self.controlnets):
            remarks.append(
                "A dense ControlNet becomes local by linearize(pipe.controlnet, ..., weights=None), several by a call "
                "for each of pipe.controlnet.nets."
            )
        if self.layers_without_text:
            remarks.append(f"In {self.layers_without_text} of the layers the image tokens stand alone, without text.")
        if self.memory:
            remarks.append(str(self.memory))
        return remarks

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{name:<{widths[0]}}  {dense:>{widths[1]}}  {local:>{widths[2]}}" for name, dense, local in rows]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join([self._heading(), "", *lines, "", *self._remarks()])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        head, *body = self._rows()
        table = line(head, "th") + "".join(line(row, "td") for row in body)
        remarks = "<br>".join(html.escape(remark) for remark in self._remarks())
        return f"<p>{html.escape(self._heading())}</p><table>{table}</table><p>{remarks}</p>"
