"""The options of `clear-attn eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline

from clear_attn.tools.evaluate import evaluation as run
from clear_attn.tools.evaluate.metric_registry import CLIP, DINO, METRICS, check_names
from clear_attn.tools.options import DTYPES, DType, device_of
from clear_attn.utils.atomic import check_empty
from clear_attn.utils.prompts import read_prompts

OF_PIPELINE = "the pipeline's"


def evaluate(
    model: Annotated[str, typer.Option(help="The pipeline: a folder or a Hub id.")],
    prompts: Annotated[Path, typer.Option(help="A text file with a prompt on each line.")],
    output_dir: Annotated[Path, typer.Option(help="A new or an empty folder for the result.")],
    weights: Annotated[
        str, typer.Option(help="auto, none (training-free), a folder, a .safetensors file or a Hub id.")
    ] = "auto",
    window: Annotated[
        int | None, typer.Option(min=1, help="Radius of the window in tokens.", show_default="the weights', else 16")
    ] = None,
    down_factor: Annotated[
        int | None,
        typer.Option(min=1, help="Side of pooled cells in tokens; 1 for none.", show_default="the weights', else 1"),
    ] = None,
    backend: Annotated[str, typer.Option(help="Of linearized attention.")] = "auto",
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Take only the first so many.", show_default="all")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default=OF_PIPELINE)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default=OF_PIPELINE)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the next has the next.")] = 0,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.", show_default=OF_PIPELINE)
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance.", show_default=OF_PIPELINE)] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Text tokens.", show_default=OF_PIPELINE)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    metric: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(METRICS)}; may be repeated.", show_default="all at hand"),
    ] = None,
    clip: Annotated[str, typer.Option(help="CLIP: a folder or a Hub id.")] = CLIP,
    dino: Annotated[str, typer.Option(help="DINO or DINOv2: a folder or a Hub id.")] = DINO,
    download: Annotated[bool, typer.Option("--download", help="Fetch weights of metrics that are not here.")] = False,
    save_pictures: Annotated[bool, typer.Option("--save-pictures", help="Keep all pictures as PNG.")] = False,
    dtype: Annotated[
        DType | None, typer.Option(help="Of the model.", show_default="bfloat16, float32 on a CPU")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="a GPU where there is one")
    ] = None,
) -> None:
    """Compare a linearized pipeline with the dense one: the same prompts and seeds, the metrics of CLEAR's paper."""
    where = device_of(device)
    try:
        texts = read_prompts(prompts)[:max_prompts]
        check_empty(output_dir)
        check_names(metric)
        pipe = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype or DTYPES[where.type])).to(where)
        pipe.set_progress_bar_config(leave=False)
        evaluation = run.evaluate(
            pipe,
            texts,
            output_dir,
            weights=None if weights == "none" else weights,
            window=window,
            down_factor=down_factor,
            backend=backend,
            height=height,
            width=width,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            batch_size=batch_size,
            metrics=metric,
            clip=clip,
            dino=dino,
            download=download,
            save_pictures=save_pictures,
        )
    except (TypeError, ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{evaluation}\n\nSaved {output_dir}")
