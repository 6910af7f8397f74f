"""The options of `clear-attn bench`, and what it prints and writes."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from clear_attn.tools.bench import model_level as model
from clear_attn.tools.bench import op_level as operation
from clear_attn.tools.bench import rank_level as between
from clear_attn.tools.bench import runner as run
from clear_attn.tools.bench.rows import HEADER, TOKEN, Row, cells, title
from clear_attn.tools.options import DTYPES, DType, device_of


class Level(StrEnum):
    """What is timed."""

    op = "op"
    model = "model"


def _size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not separator or not height.isdecimal() or not width.isdecimal() or not int(height) or not int(width):
        raise typer.BadParameter(f"{text!r} is no size; write height x width, as 128x96")
    return int(height), int(width)


def _of_whole_tokens(size: tuple[int, int]) -> tuple[int, int]:
    if size[0] % TOKEN or size[1] % TOKEN:
        raise typer.BadParameter(f"{size[0]}x{size[1]} is not in whole tokens of {TOKEN} px", param_hint="--pixels")
    return size[0] // TOKEN, size[1] // TOKEN


def bench(
    level: Annotated[Level, typer.Option(help="One attention, or one denoising step of FLUX.1.")] = Level.op,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="a GPU where there is one")
    ] = None,
    grid: Annotated[list[str] | None, typer.Option(help="Size in tokens, as 128x128; may be repeated.")] = None,
    pixels: Annotated[
        list[str] | None, typer.Option(help="Size in pixels, as 2048x2048; may be repeated.", show_default="1024x1024")
    ] = None,
    window: Annotated[
        list[int] | None, typer.Option(min=1, help="Radius in tokens; may be repeated.", show_default="8, 16, 32")
    ] = None,
    down_factor: Annotated[
        list[int] | None, typer.Option(min=1, help="Side of pooled cells; may be repeated.", show_default="1")
    ] = None,
    text: Annotated[int, typer.Option(min=0, help="Text tokens.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 24,
    head_dim: Annotated[int, typer.Option(min=8, help="Their size.")] = 128,
    dtype: Annotated[
        DType | None, typer.Option(help="Of the inputs.", show_default="bfloat16, float32 on a CPU")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    backward: Annotated[bool, typer.Option("--backward", help="With a backward pass (level op).")] = False,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only this one of the table's lines; may be repeated.", show_default="all")
    ] = None,
    blocks: Annotated[
        int,
        typer.Option(min=1, max=19, help="Time so many of the 19 double blocks, with twice as many single ones."),
    ] = 19,
    runs: Annotated[int | None, typer.Option(min=1, help="Times of each.", show_default="20, 5 on a CPU")] = None,
    dense_queries: Annotated[
        int, typer.Option(min=1, help="Time dense attention for at most so many queries (level op).")
    ] = 32768,
    ranks: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Time nothing; count what so many ranks send each other. May be repeated."),
    ] = None,
    attention_seconds: Annotated[
        float | None, typer.Option(min=0, help="Of a step on one rank, as measured: its attention. With --ranks.")
    ] = None,
    rest_seconds: Annotated[float | None, typer.Option(min=0, help="Likewise: all else of the step.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the rows go as JSON.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Where a plot goes, as times.png.")] = None,
) -> None:
    """Time attention, or a whole step, beside dense attention and beside FlexAttention in raster order."""
    sizes = [_size(each) for each in grid or ()] + [_of_whole_tokens(_size(each)) for each in pixels or ()]
    for option, path in (("--json", json_file), ("--plot", plot_file)):
        if path and not path.resolve().parent.is_dir():
            raise typer.BadParameter(f"no such directory: {path.resolve().parent}", param_hint=option)
        if path and path.is_dir():
            raise typer.BadParameter(f"{path} is a directory; give a file", param_hint=option)
    if plot_file:
        _check_plot(plot_file)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler writes to the terminal
    where = device_of(device)
    known = model.VARIANTS if level == Level.model else operation.VARIANTS
    for name in variant or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--variant")
    if level == Level.model and (head_dim % 32 or backward):
        problem = "forward only" if backward else f"for a head_dim divisible by 32, got {head_dim}"
        raise typer.BadParameter(f"level model is {problem}", param_hint="--backward" if backward else "--head-dim")
    settings = run.Settings(
        level=level.value,
        device=where,
        grids=tuple(sizes or [(64, 64)]),
        windows=tuple(window or [8, 16, 32]),
        down_factors=tuple(down_factor or [1]),
        text=text,
        heads=heads,
        head_dim=head_dim,
        dtype=getattr(torch, dtype or DTYPES[where.type]),
        batch=batch,
        backward=backward,
        variants=tuple(variant or known),
        blocks=blocks,
        runs=runs or run.RUNS[where.type],
        most_dense_queries=dense_queries,
    )
    _check_goes_with_ranks(
        bool(ranks), {"--attention-seconds": attention_seconds, "--rest-seconds": rest_seconds}, {"--plot": plot_file}
    )
    if ranks:
        _count_between_ranks(settings, ranks, attention_seconds, rest_seconds, json_file)
        return
    console, rows = Console(), []
    for of_case in run.run(settings, lambda text: console.print(text, style="dim", highlight=False, soft_wrap=True)):
        _print(console, of_case)
        rows += of_case
        if json_file:  # after each case, for whoever stops it
            json_file.write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n")
        if plot_file:
            from clear_attn.tools.bench.chart import plot

            plot(rows, plot_file)
    if not rows:
        raise typer.BadParameter("nothing is left to time", param_hint="--variant")
    _check_errors(rows)


def _count_between_ranks(
    settings: run.Settings,
    numbers: list[int],
    attention_seconds: float | None,
    rest_seconds: float | None,
    json_file: Path | None,
) -> None:
    cases, times = list(settings.cases()), None
    if attention_seconds is not None and rest_seconds is not None:
        times = between.Times(attention_seconds, rest_seconds)
    if (attention_seconds is None) != (rest_seconds is None) or (times and len(cases) > 1):
        raise typer.BadParameter(
            "needs --rest-seconds beside it, and a single size, window and down_factor",
            param_hint="--attention-seconds",
        )
    console = Console(width=140)
    try:
        counted = [list(between.scalings([case], numbers, times)) for case in cases]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--ranks") from None
    for rows in counted:
        header, lines = between.cells(rows)
        table = Table(*header, title=between.title(rows[0]), title_justify="left", box=None, pad_edge=False)
        for line in lines:
            table.add_row(*line)
        console.print(table, soft_wrap=True)
    if json_file:
        every = [row.to_dict() for rows in counted for row in rows]
        json_file.write_text(json.dumps(every, indent=1) + "\n")


def _check_goes_with_ranks(ranks: bool, only_with: dict[str, object], only_without: dict[str, object]) -> None:
    for option, value in (only_without if ranks else only_with).items():
        if value is not None:
            raise typer.BadParameter(f"goes {'not ' if ranks else 'only '}with --ranks", param_hint=option)


def _check_plot(path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise typer.BadParameter(
            "a plot needs matplotlib: pip install 'clear-attn[plot]'", param_hint="--plot"
        ) from None
    if path.suffix.lower().removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        raise typer.BadParameter(f"{path} names no kind of picture; let it end in .png", param_hint="--plot")


def _print(console: Console, rows: list[Row]) -> None:
    table = Table(title=title(rows[0]), title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for line in cells(rows):
        table.add_row(*line)
    first = rows[0]
    # In full, also where it is wider than the terminal.
    wide = Console(file=console.file, width=max(console.width, 140), force_terminal=console.is_terminal)
    wide.print(table, soft_wrap=True)
    blocks = f" {first.blocks} of 57 blocks" if first.blocks else " a share of the queries"
    if any(row.extrapolated for row in rows):
        console.print(f"* scaled from{blocks}.", highlight=False)
    console.print(
        f"{first.device}, {first.threads} threads, torch {first.torch}; a large matrix product runs at "
        f"{first.matmul_flops_per_s / 1e12:.3g} TFLOP/s. Medians of {first.runs} runs in turn.\n",
        highlight=False,
        soft_wrap=True,
    )


def _check_errors(rows: list[Row]) -> None:
    """Ends with an error where a result was not the rule's; how half precision adds up over blocks is not known."""
    most = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
    judged = [row for row in rows if row.error is not None and (row.level == "op" or row.dtype == "float32")]
    wrong = [row for row in judged if not (row.error or 0.0) < most[row.dtype]]
    for row in wrong:
        typer.echo(
            f"{row.variant} at {row.height}x{row.width}, window {row.window}: {row.error:.1e} off the rule", err=True
        )
    if wrong:
        raise typer.Exit(1)
