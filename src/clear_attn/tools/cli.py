"""The command `clear-attn`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clear_attn.models import ADAPTERS
from clear_attn.tools.bench.bench_command import bench
from clear_attn.tools.evaluate.evaluate_command import evaluate
from clear_attn.tools.generate_command import generate
from clear_attn.tools.options import check_picture_file

app = typer.Typer(
    name="clear-attn",
    help="Local attention for pre-trained diffusion transformers, after CLEAR (arXiv 2412.16112).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ARCHITECTURES = {size.name: (adapter, size.config) for adapter in ADAPTERS for size in adapter.architectures}

DEMO_CAPTIONS = (
    "a red circle on a blue ground, at the top left",
    "a yellow triangle on a red ground, at the top right",
    "a black triangle on a white ground, in the middle",
    "a black cross on a yellow ground, at the bottom left",
)


app.command()(bench)
app.command("eval")(evaluate)
app.command()(generate)


@app.callback()
def main() -> None:
    pass


@app.command()
def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; may be repeated.", show_default="four captions")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Radius of the window in tokens; the picture has 16 x 16.")] = 8,
    down_factor: Annotated[int, typer.Option(min=1, help="Side of pooled cells in tokens; 1 for none.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("clear-attn-demo.png"),
) -> None:
    """Draw captions with the small FLUX in the box: dense, linearized, and with its distilled weights."""
    check_picture_file(output, "--output")
    # Only here, for torch and diffusers take seconds to import.
    from clear_attn.demo import comparison as draw
    from clear_attn.methods import Clear

    report = draw.compare(prompt or list(DEMO_CAPTIONS), Clear(window, down_factor), seed, output)
    typer.echo(f"{report}\n\nSaved {output}")


def _check_architecture(name: str) -> str:
    if name not in ARCHITECTURES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(ARCHITECTURES)}")
    return name


@app.command()
def cost(
    height: Annotated[int, typer.Option(help="Height of the picture in pixels.")],
    width: Annotated[int, typer.Option(help="Width of the picture in pixels.")],
    window: Annotated[int | None, typer.Option(help="Radius of the window in tokens.", show_default="16")] = None,
    down_factor: Annotated[
        int | None, typer.Option(help="Side of pooled cells in tokens; 1 for none.", show_default="1")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Another way to attend, as Swin(side=8).", show_default="CLEAR")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Length of the text sequence.", show_default="512 for flux, 333 for sd3")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures in one forward pass.")] = 1,
    model: Annotated[
        str, typer.Option(help="The architecture.", metavar="|".join(ARCHITECTURES), callback=_check_architecture)
    ] = "flux",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the work of attention, dense and linearized."""
    from clear_attn.methods import parse
    from clear_attn.profiling.attention_cost import cost as count

    try:
        counted = count(
            _without_weights(model).bfloat16(),
            height,
            width,
            window=window,
            down_factor=down_factor,
            method=None if method is None else parse(method),
            text_tokens=text_tokens,
            batch=batch,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(json.dumps(counted.to_dict(), indent=2) if as_json else str(counted))


def _without_weights(architecture: str) -> Any:
    """Build a transformer of a published size on the meta device."""
    import diffusers
    import torch

    adapter, config = ARCHITECTURES[architecture]
    with torch.device("meta"):
        return getattr(diffusers, adapter.transformer_class)(**config)
