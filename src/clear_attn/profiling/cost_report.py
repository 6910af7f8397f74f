"""FLOPs of one forward pass and of a run, dense and linearized, as numbers and as a table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clear_attn.core.plan import pooled_count
from clear_attn.core.window_mask import BLOCK
from clear_attn.methods import Dense, Method
from clear_attn.profiling.memory import Memory
from clear_attn.utils.units import FLOPS, format_bytes, in_units

# What `Cost.to_dict` copies: fields, and properties computed from them.
SIZES = ("height", "width", "text_tokens", "padding_tokens", "batch", "heads", "head_dim")
FIELDS = (*SIZES, "dense_above_sigma", "windows_by_sigma", "controlnets", "uncounted_controlnets")
TOKENS_AND_LAYERS = ("image_tokens", "pooled_tokens", "layers", "layers_without_text")
DERIVED = (*TOKENS_AND_LAYERS, "layer_gflops", "dense_layer_gflops", "ratio", "block_list_bytes")

# A line of the table: what is counted, dense, by the method, and the unit.
Row = tuple[str, str, str, str]


class LayerGroup(NamedTuple):
    """Layers with the same method.

    Attributes:
        method: the method of the layers.
        has_text: whether they attend to text.
        layers: the number of layers.
        exception: whether a schedule names these layers.
    """

    method: Method
    has_text: bool
    layers: int = 1
    exception: bool = False


class Phase(NamedTuple):
    """The steps of a run in which all layers keep their method.

    Attributes:
        method: the method of the layers that the schedule does not name.
        sigmas: the sigma of each step.
        groups: all attention layers.
    """

    method: Method
    sigmas: tuple[float, ...]
    groups: tuple[LayerGroup, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas)


@dataclass(frozen=True, repr=False)
class Cost:
    """The attention of one forward pass of a transformer; it prints as a table, in a notebook too.

    FLOPs count multiplications and additions: 4 x query-key pairs x (heads x head_dim) per layer, as in table 2 of
    CLEAR (arXiv 2412.16112); other methods count their own. Projections and the rest of a layer, which linearizing does
    not change, are not counted.

    Attributes:
        height, width (`int`): the grid in tokens.
        text_tokens, batch (`int`): the numbers of text tokens and of images.
        uncounted_controlnets (`int`): the number of ControlNets that are not supported and always dense, as Z-Image's.
        padding_tokens (`int`): the number of learned padding tokens of the image, which count as text in all layers.
        heads, head_dim (`int`): the heads of a layer.
        method (`Method`): the method of layers that the schedule does not name.
        groups (tuple of `LayerGroup`): all attention layers.
        dense_above_sigma (`float`, *optional*): calls above this sigma are dense.
        windows_by_sigma: sigmas, and the window of calls above each. All numbers but those of a run describe a call
            below all sigmas.
        controlnets: for each ControlNet of the pipeline, the FLOPs of its attention, dense and with its own method. The
            other numbers do not include them.
        text_attends_to_image (`bool`): whether text queries attend to all keys; else only to earlier text.
        memory (`Memory`, *optional*): the memory of weights, a forward pass and decoding.
        run (tuple of `Phase`): the steps of a run, by method; empty if `cost` was given neither steps nor sigmas.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> report = clear.cost(demo.pipeline(), 1024, 1024, window=8)
        >>> f"{report.ratio:.0f} times fewer at {report.height} x {report.width} tokens"
        '67 times fewer at 128 x 128 tokens'
    """

    height: int
    width: int
    text_tokens: int
    batch: int
    heads: int
    head_dim: int
    method: Method
    groups: tuple[LayerGroup, ...]
    dense_above_sigma: float | None = None
    controlnets: tuple[tuple[int, int], ...] = ()
    memory: Memory | None = None
    padding_tokens: int = 0
    uncounted_controlnets: int = 0
    windows_by_sigma: tuple[tuple[float, int], ...] = ()
    run: tuple[Phase, ...] = ()
    text_attends_to_image: bool = True

    @classmethod
    def of_layer(
        cls, grid: tuple[int, int], text_tokens: int, heads: int, head_dim: int, method: Method, batch: int = 1
    ) -> Cost:
        """Return the cost of a single layer with text."""
        return cls(*grid, text_tokens, batch, heads, head_dim, method, (LayerGroup(method, True),))

    @property
    def image_tokens(self) -> int:
        return self.height * self.width

    @property
    def pooled_tokens(self) -> int:
        """The number of pooled keys of CLEAR."""
        return pooled_count((self.height, self.width), self.method.pooled_factor or 1)

    @property
    def layers(self) -> int:
        """The number of attention layers."""
        return sum(group.layers for group in self.groups)

    @property
    def layers_without_text(self) -> int:
        """The number of attention layers that do not attend to text."""
        return sum(group.layers for group in self.groups if not group.has_text)

    def flops(self, pairs: int) -> int:
        """Return the FLOPs of a number of query-key pairs."""
        return 4 * pairs * self.heads * self.head_dim

    def layer_work(self, method: Method, has_text: bool = True) -> dict[str, int]:
        """Return the FLOPs of one layer with a method for one image, by kind."""
        text = self.padding_tokens + (self.text_tokens if has_text else 0)
        if self.text_attends_to_image:
            of_text = {"text queries, all keys": self.flops(text * (text + self.image_tokens))}
        else:
            of_text = {"text queries, earlier text keys": self.flops(text * (text + 1) // 2)}
        return {**of_text, **method.flops((self.height, self.width), text, self.heads, self.head_dim)}

    def own_layer_work(self) -> dict[str, float]:
        """Return the FLOPs of a linearized layer with text for one image, by kind; the mean if layers differ."""
        own = [group for group in self.groups if group.has_text and not group.exception]
        total = sum(group.layers for group in own)
        works = [(group.layers, self.layer_work(group.method)) for group in own]
        return {kind: sum(layers * work[kind] for layers, work in works) / total for kind in (works or [(0, {})])[0][1]}

    def _group_flops(self, group: LayerGroup, method: Method) -> int:
        return group.layers * sum(self.layer_work(method, group.has_text).values())

    def _flops_of(self, groups: tuple[LayerGroup, ...]) -> int:
        return self.batch * sum(self._group_flops(group, group.method) for group in groups)

    @property
    def step_flops(self) -> int:
        """FLOPs of all layers and images."""
        return self._flops_of(self.groups)

    @property
    def dense_step_flops(self) -> int:
        return self.batch * sum(self._group_flops(group, Dense()) for group in self.groups)

    @property
    def steps(self) -> int:
        """The number of steps of the run."""
        return sum(phase.steps for phase in self.run)

    @property
    def run_flops(self) -> int:
        """FLOPs of all steps of the run, layers and images; 0 without a run."""
        return sum(phase.steps * self._flops_of(phase.groups) for phase in self.run)

    @property
    def dense_run_flops(self) -> int:
        return self.steps * self.dense_step_flops

    @property
    def layer_gflops(self) -> float | None:
        """FLOPs of a linearized layer with text; None if the schedule names all such layers."""
        return sum(self.own_layer_work().values()) / 1e9 or None

    @property
    def dense_layer_gflops(self) -> float:
        return sum(self.layer_work(Dense()).values()) / 1e9

    @property
    def ratio(self) -> float:
        """Dense FLOPs divided by linearized FLOPs."""
        return self.dense_step_flops / self.step_flops

    @property
    def run_ratio(self) -> float | None:
        """Dense FLOPs divided by linearized FLOPs of the run; None without a run."""
        return self.dense_run_flops / self.run_flops if self.run else None

    @property
    def block_list_bytes(self) -> int:
        """Memory of FlexAttention's block lists, shared by all layers; it grows with the square of the tokens."""
        keys = self.text_tokens + self.padding_tokens + self.image_tokens + self.pooled_tokens
        query_blocks, key_blocks = -(-self.image_tokens // BLOCK), -(-keys // BLOCK)
        return 2 * 4 * query_blocks * (key_blocks + 1)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, for JSON."""
        return {
            **{name: getattr(self, name) for name in (*FIELDS, *DERIVED)},
            "method": self.method.to_dict(),
            "memory": self.memory.to_dict() if self.memory else None,
            "step_gflops": self.step_flops / 1e9,
            "dense_step_gflops": self.dense_step_flops / 1e9,
            "run": [
                {
                    "method": phase.method.to_dict(),
                    "sigmas": list(phase.sigmas),
                    "step_gflops": self._flops_of(phase.groups) / 1e9,
                }
                for phase in self.run
            ],
            "run_gflops": self.run_flops / 1e9 if self.run else None,
            "dense_run_gflops": self.dense_run_flops / 1e9 if self.run else None,
        }

    def _rows(self) -> list[Row]:
        def row(name: str, dense: float, own: float) -> Row:
            cells, unit = in_units((dense, own), FLOPS, 4)
            dense_cell, cell = (text if flops else "-" for text, flops in zip(cells, (dense, own), strict=True))
            return name, dense_cell, cell, unit

        own = self.own_layer_work()
        dense = self.layer_work(Dense()) if own else {}
        kinds = [
            *((kind, dense.get(kind, 0), own.get(kind, 0)) for kind in {**dense, **own}),
            ("a layer", sum(dense.values()), sum(own.values())),
            *(
                (
                    f"{group.layers} layer{'s' * (group.layers > 1)}, {group.method.as_arguments()}",
                    self._group_flops(group, Dense()),
                    self._group_flops(group, group.method),
                )
                for group in self.groups
                if group.exception
            ),
            (f"all {self.layers} layers", self.dense_step_flops, self.step_flops),
        ]
        rows = [row(*kind) for kind in kinds if any(kind[1:])]
        for number, (dense_net, net) in enumerate(self.controlnets, start=1):
            rows.append(row(f"ControlNet {number}{', dense' if dense_net == net else ''}", dense_net, net))
        rows += [
            row(_name_of(phase), phase.steps * self.dense_step_flops, phase.steps * self._flops_of(phase.groups))
            for phase in (self.run if len(self.run) > 1 else ())
        ]
        if self.run:
            rows.append(row(f"all {self.steps} steps", self.dense_run_flops, self.run_flops))
        return [("FLOPs of attention", "dense", self.method.title, ""), *rows]

    def _heading(self) -> str:
        batch = f", {self.batch} images at a time" if self.batch > 1 else ""
        return (
            f"{self.height} x {self.width} image tokens, {self.text_tokens} text tokens, "
            f"{self.method.as_arguments()}{batch}: {self._saving()}"
        )

    def _saving(self) -> str:
        where = f" in {self.steps} steps" if self.run else ""
        ratio = self.run_ratio or self.ratio
        if ratio >= 1.05:
            return f"{ratio:.1f} times fewer FLOPs of attention{where}"
        share = f"{1 / ratio:.1%} of the FLOPs of dense attention{where}"
        groups = [group for phase in self.run for group in phase.groups] or self.groups
        if all(group.method.covers((self.height, self.width)) for group in groups):
            return f"nothing is saved, since each image token attends to all others ({share})"
        return f"{'nearly ' if ratio > 1 else ''}nothing is saved ({share})"

    def _remarks(self) -> list[str]:
        remarks = ["Unchanged: text queries, and everything that is not attention."]
        lists = f"block lists ({format_bytes(self.block_list_bytes)}, backend flex only)"
        quadratic = [*([lists] if self.method.uses_backends else []), *filter(None, [self.method.quadratic])]
        if quadratic:
            remarks.append(f"Still growing with the square of the tokens: {' and '.join(quadratic)}.")
        if self.dense_above_sigma is not None or self.windows_by_sigma:
            dense = [] if self.dense_above_sigma is None else [f"above sigma {self.dense_above_sigma:g} are dense"]
            wider = [f"above sigma {above:g} have window {window}" for above, window in self.windows_by_sigma]
            counted = "rows of layers count one below" if self.run else "this counts one below; steps= counts a run"
            remarks.append(f"Steps {', '.join([*dense, *wider])}; {counted}.")
        if any(dense == own for dense, own in self.controlnets):
            remarks.append(
                "Linearize a dense ControlNet with linearize(pipe.controlnet, ..., weights=None), several with a call "
                "for each of pipe.controlnet.nets."
            )
        if self.uncounted_controlnets:
            remarks.append(f"Not counted: {self.uncounted_controlnets} ControlNets, which stay dense.")
        if self.layers_without_text:
            remarks.append(f"{self.layers_without_text} of the layers do not attend to text.")
        if self.memory:
            remarks += str(self.memory).splitlines()
        return remarks

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {dense:>{widths[1]}}  {own:>{widths[2]}}  {unit}".rstrip()
            for name, dense, own, unit in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([self._heading(), "", *lines, "", *self._remarks()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        head, *body = self._rows()
        table = line(head, "th") + "".join(line(row, "td") for row in body)
        remarks = "<br>".join(html.escape(remark) for remark in self._remarks())
        return f"<p>{html.escape(self._heading())}</p><table>{table}</table><p>{remarks}</p>"


def _name_of(phase: Phase) -> str:
    first, last = max(phase.sigmas), min(phase.sigmas)
    sigmas = f"{first:.3f}" if phase.steps == 1 else f"{first:.3f} to {last:.3f}"
    return f"{phase.steps} step{'s' * (phase.steps > 1)}, sigma {sigmas}, {phase.method.as_arguments()}"
