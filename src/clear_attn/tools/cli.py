"""The command `clear-attn`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import clear_attn
from clear_attn.tools import options
from clear_attn.tools.bench.bench_command import bench
from clear_attn.tools.evaluate_command import evaluate
from clear_attn.tools.generate_command import generate
from clear_attn.tools.reporting import Command

if TYPE_CHECKING:
    from clear_attn.models import ModelAdapter
    from clear_attn.models.adapter import Architecture

DEMO_OUTPUT = Path("clear-attn-demo.png")
DEMO_CAPTIONS = (
    "a red circle on a blue ground, at the top left",
    "a yellow triangle with black stripes left of a green square, on a white ground",
    "a white cross above a blue circle, on a red ground with black dots",
    "a red square left of a blue circle, both above a black cross, on a yellow ground",
)


app = typer.Typer(
    name="clear-attn",
    help="Local attention for pre-trained diffusion transformers, after CLEAR (arXiv 2412.16112).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    # Its boxes cut the names of options and break messages.
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(clear_attn.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _demo_output(context: typer.Context, file: Path | None) -> Path:
    """Return the file of the demo's image; the default one is the demo's own, and may be replaced."""
    return options.check_image_output(context, file) if file else options.check_image_can_be_saved(DEMO_OUTPUT)


@app.command(cls=Command, short_help="Draw with the small FLUX in the package.")
def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="A caption to draw. May be repeated.", show_default="four captions")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="The radius of the window in tokens; the image has 32 x 32.")] = 8,
    down_factor: Annotated[
        int, typer.Option(min=1, help="The side of pooled cells in tokens; 1 means no pooling.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="The seed of the noise.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            callback=_demo_output, help="The file of the image.", show_default=f"{DEMO_OUTPUT}, replaced if it exists"
        ),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw captions with the small FLUX in the package, dense and linearized, and time a larger image."""
    from clear_attn.demo.comparison import compare
    from clear_attn.methods import Clear

    file = output or DEMO_OUTPUT
    report = compare(prompt or list(DEMO_CAPTIONS), Clear(window, down_factor), seed, file)
    typer.echo(f"{report}\n\nSaved {file}")


def _architectures() -> dict[str, tuple[ModelAdapter, Architecture]]:
    """Return the published sizes by name, each with the model's adapter."""
    from clear_attn.models import ADAPTERS

    return {size.name: (adapter, size) for adapter in ADAPTERS for size in adapter.architectures}


@app.command(cls=Command, short_help="Count FLOPs and estimate memory.")
def cost(
    height: Annotated[int, typer.Option(help=options.HEIGHT)],
    width: Annotated[int, typer.Option(help=options.WIDTH)],
    window: Annotated[int | None, options.window("16")] = None,
    down_factor: Annotated[int | None, options.down_factor("1")] = None,
    method: Annotated[
        str | None, typer.Option(help="The attention method, such as 'Swin(side=8)'.", show_default="CLEAR")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="The length of the text in tokens.", show_default="the model's, 512 for flux")
    ] = None,
    batch: Annotated[int, typer.Option(help="The number of images in one forward pass.")] = 1,
    model: Annotated[
        str,
        typer.Option(
            help="The architecture: a name such as flux or sd3.5-large, not a Hub id. An unknown name lists all."
        ),
    ] = "flux",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Count the FLOPs of attention, dense and linearized, and estimate memory."""
    import diffusers
    import torch

    from clear_attn.methods import parse
    from clear_attn.profiling.attention_cost import cost as cost_of

    known = _architectures()
    if model not in known:
        raise options.refused("--model", f"{model!r} is not one of {', '.join(known)}")
    adapter, size = known[model]
    adapter.check_version()
    size.check_version()
    with torch.device("meta"):
        transformer = getattr(diffusers, adapter.transformer_class)(**size.config).bfloat16()
    counted = cost_of(
        transformer,
        height,
        width,
        window=window,
        down_factor=down_factor,
        method=parse(method) if method else None,
        text_tokens=text_tokens,
        batch=batch,
    )
    typer.echo(json.dumps(counted.to_dict(), indent=2) if as_json else str(counted))


app.command(cls=Command, short_help="Draw a large image.")(generate)
app.command("eval", cls=Command, short_help="Compare linearized with dense images.")(evaluate)
app.command(cls=Command, short_help="Time attention and whole steps.")(bench)
