"""The command `clear-attn bench`: options, printed tables and files."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clear_attn.tools import options
from clear_attn.tools.bench import TOKEN
from clear_attn.tools.reporting import on_interrupt
from clear_attn.utils.atomic import atomic_text, warn_if_unwritten

if TYPE_CHECKING:
    from clear_attn.tools.bench.case import Case, Row

RUNS = {"cpu": 5, "cuda": 20}
# How the rows are written, by file.
Outputs = dict[Path, Callable[[Path, Sequence[Any]], None]]
# Options that are fields of a case.
CASE_SETTINGS = ("level", "text", "heads", "batch", "backward", "blocks", "dense_queries")


def _parse_size(text: str) -> Any:
    height, _, width = text.partition("x")
    if not height.isdecimal() or not width.isdecimal() or not int(height) or not int(width):
        raise typer.BadParameter(f"{text!r} is not a size; write height x width, as 128x96")
    return int(height), int(width)


def _check_plot(context: typer.Context, file: Path | None) -> Path | None:
    if options.check_output(context, file) is None:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise typer.BadParameter("a plot needs matplotlib: pip install matplotlib") from None
    if file and file.suffix.lower().removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        raise typer.BadParameter(f"{file} names no image format; let it end in .png")
    return file


def bench(
    context: typer.Context,
    level: Annotated[
        Literal["op", "model", "compile"],
        typer.Option(
            help="Whether to time one attention (op) or one denoising step of FLUX.1 (model), or to compile the fused "
            "kernels without a GPU (compile)."
        ),
    ] = "op",
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="The GPU to compile for, as sm_90 or gfx942, with --level compile. May be repeated.",
            show_default="none",
        ),
    ] = None,
    device: options.Device = None,
    grid: Annotated[
        list[Any] | None,
        typer.Option(
            parser=_parse_size,
            metavar="HxW",
            help="A size in tokens, as 128x96. May be repeated.",
            show_default="64x64",
        ),
    ] = None,
    pixels: Annotated[
        list[Any] | None,
        typer.Option(
            parser=_parse_size,
            metavar="HxW",
            help="A size in pixels, rounded down to whole tokens. May be repeated.",
            show_default="1024x1024, unless --grid is given",
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(min=1, help="The radius of a window in tokens. May be repeated.", show_default="8, 16, 32"),
    ] = None,
    down_factor: Annotated[
        list[int] | None,
        typer.Option(min=1, help="The side of pooled cells in tokens. May be repeated.", show_default="1"),
    ] = None,
    text: Annotated[int, typer.Option(min=0, help="The number of text tokens.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="The number of attention heads.")] = 24,
    head_dim: Annotated[
        list[int] | None,
        typer.Option(min=8, help="The channels of a head. May be repeated with --level compile.", show_default="128"),
    ] = None,
    dtype: options.DType = None,
    batch: Annotated[int, typer.Option(min=1, help="The number of images in one forward pass.")] = 1,
    backward: Annotated[bool, typer.Option("--backward", help="Time a backward pass, too, with --level op.")] = False,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="A row of the table to time: dense, dense-pooled, raster-flex, triton, flex or tiled; with --level "
            "model dense, triton, flex, tiled or bound. May be repeated.",
            show_default="all",
        ),
    ] = None,
    blocks: Annotated[
        int, typer.Option(min=1, max=19, help="The number of double blocks to compute, with --level model.")
    ] = 19,
    runs: Annotated[
        int | None,
        typer.Option(min=1, help="The number of runs of each variant.", show_default="20 on a GPU, 5 on a CPU"),
    ] = None,
    dense_queries: Annotated[
        int, typer.Option(min=1, help="The most queries of dense attention to time, with --level op.")
    ] = 32768,
    ranks: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="A number of ranks. Count what they send each other, and time nothing. May be repeated.",
            show_default="none",
        ),
    ] = None,
    attention_seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="The seconds of attention in a step on one rank, with --ranks.", show_default="not known"
        ),
    ] = None,
    rest_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="The other seconds of a step on one rank, with --ranks.", show_default="not known"),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            dir_okay=False,
            callback=options.check_output,
            help="The file of the rows, as JSON.",
            show_default="not saved",
        ),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot", dir_okay=False, callback=_check_plot, help="The file of a chart.", show_default="not saved"
        ),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Time attention, or a whole step, next to dense attention and to FlexAttention in raster order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler writes to the terminal
    if (level == "compile") != bool(arch):
        raise typer.BadParameter("--level compile and --arch go together; give both, as --arch sm_90")
    if level == "compile":
        _compile(arch or (), head_dim or [128], json_file)
        return
    from clear_attn.tools.bench.case import Case
    from clear_attn.tools.bench.runner import LEVELS
    from clear_attn.utils.image_sizes import round_down

    # Other configurations of the fused kernel are timed only by name.
    names = tuple(variant or (name for name in LEVELS[level].VARIANTS if not name.startswith("triton-")))
    for name in names:
        if name not in LEVELS[level].VARIANTS:
            known = ", ".join(LEVELS[level].VARIANTS)
            raise options.refused("--variant", f"{name!r} is none of {known}")
    where = options.select_device(device)
    precision, settings = options.select_dtype(dtype, where), {name: context.params[name] for name in CASE_SETTINGS}
    sizes = [round_down(size, TOKEN, stacklevel=1) for size in pixels or ()]
    grids = [*(grid or ()), *((height // TOKEN, width // TOKEN) for height, width in sizes)]
    cases = [
        Case(height, width, radius, factor, precision, where, head_dim=size_of_head, **settings)
        for (height, width), radius, factor, size_of_head in itertools.product(
            grids or [(64, 64)], window or [8, 16, 32], down_factor or [1], head_dim or [128]
        )
    ]
    if not ranks and (attention_seconds, rest_seconds) != (None, None):
        raise typer.BadParameter("--attention-seconds and --rest-seconds need --ranks")
    if ranks and plot_file:
        raise typer.BadParameter("--plot shows times, and --ranks takes none; leave one out")
    if ranks:
        _count_between_ranks(cases, ranks, attention_seconds, rest_seconds, json_file)
    else:
        _time(cases, names, runs or RUNS[where.type], json_file, plot_file)


def _compile(architectures: Sequence[str], head_dims: Sequence[int], json_file: Path | None) -> None:
    from clear_attn.tools.bench import compile_level

    rows: list[Any] = []
    outputs = _outputs(json_file)
    with _rows_kept(outputs, rows):
        for row in compile_level.compiled_rows(architectures, head_dims, typer.echo):
            typer.echo(compile_level.format_row(row, is_first=not rows))
            rows.append(row)
            _save_so_far(outputs, rows)
    typer.echo(compile_level.FOOTNOTE)
    _save(outputs, rows)


def _time(
    cases: Sequence[Case], names: Sequence[str], runs: int, json_file: Path | None, plot_file: Path | None
) -> None:
    from clear_attn.tools.bench import runner
    from clear_attn.tools.bench.case import format_rows

    level = runner.LEVELS[cases[0].level]
    reasons = {level.unsupported_reason(name, case) for case in cases for name in names}
    if None not in reasons:
        raise typer.BadParameter(f"nothing is left to time: {'; '.join(sorted(map(str, reasons)))}")
    rows: list[Row] = []
    outputs = _outputs(json_file)
    if plot_file:
        from clear_attn.tools.bench.chart import plot

        outputs[plot_file] = lambda file, rows: plot(level.TITLE, rows, file)
    with _rows_kept(outputs, rows):
        for of_case in runner.run(cases, names, runs, typer.echo):
            typer.echo(format_rows(level.TITLE, of_case, level.LEGEND))
            rows += of_case
            _save_so_far(outputs, rows)
    _save(outputs, rows)
    most = level.MAX_ERRORS.get(cases[0].dtype_name, math.inf)
    # Written so that NaN counts as wrong.
    wrong = [row for row in rows if row.timing.error is not None and not row.timing.error < most]
    for row in wrong:
        case = row.case
        place = f"{row.subject.name} at {case.height}x{case.width}, window {case.window}"
        typer.echo(f"{place}: {row.timing.error:.1e} off the rule", err=True)
    if wrong or not rows:
        raise typer.Exit(1)


def _count_between_ranks(
    cases: Sequence[Case],
    ranks: Sequence[int],
    attention_seconds: float | None,
    rest_seconds: float | None,
    json_file: Path | None,
) -> None:
    from clear_attn.tools.bench.rank_level import Times, format_scalings, scale

    times = None
    if attention_seconds is not None and rest_seconds is not None and len(cases) == 1:
        times = Times(attention_seconds, rest_seconds)
    elif (attention_seconds, rest_seconds) != (None, None):
        raise typer.BadParameter(
            "--attention-seconds and --rest-seconds go together, with a single size, window and down_factor"
        )
    scalings = [[scale(case, number, times) for number in ranks] for case in cases]
    for of_case in scalings:
        typer.echo(format_scalings(of_case))
    _save(_outputs(json_file), list(itertools.chain(*scalings)))


def _outputs(json_file: Path | None) -> Outputs:
    return {json_file: _write} if json_file else {}


def _write(file: Path, rows: Sequence[Any]) -> None:
    atomic_text(file, json.dumps([row.to_dict() for row in rows], indent=1) + "\n")


def _rows_kept(outputs: Outputs, rows: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """Rows are written as soon as they are measured, so that an interrupt loses little."""

    def kept() -> str:
        files = f"{' and '.join(map(str, outputs))} {'have' if len(outputs) > 1 else 'has'}"
        return f"{files} {len(rows)} row{'s' * (len(rows) > 1)}" if outputs and rows else "nothing was saved"

    return on_interrupt(kept)


def _save_so_far(outputs: Outputs, rows: Sequence[Any]) -> None:
    """Write the rows of the cases so far; a full disk does not end the measurement."""
    for file, save in outputs.items():
        with warn_if_unwritten(file):
            save(file, rows)


def _save(outputs: Outputs, rows: Sequence[Any]) -> None:
    for file, save in outputs.items() if rows else ():
        save(file, rows)
