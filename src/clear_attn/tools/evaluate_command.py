"""The command `clear-attn eval`: its options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from clear_attn.tools import options
from clear_attn.tools.reporting import on_interrupt, option_names, spell_options

# Options that are arguments of `evaluation.evaluate`.
PASSED_ON = (
    *("window", "down_factor", "backend", "height", "width", "seed", "num_inference_steps", "guidance_scale"),
    *("max_sequence_length", "batch_size", "clip", "dino", "download", "save_images", "resume"),
)


def evaluate(
    context: typer.Context,
    model: options.Model,
    prompts: Annotated[Path, options.input_file("A text file with one prompt per line.")],
    output_dir: Annotated[Path, typer.Option(help="The folder of the result, new or empty, or to resume.")],
    weights: options.Weights = "auto",
    window: options.Window = None,
    down_factor: options.DownFactor = None,
    backend: Annotated[
        str, typer.Option(help="The backend of linearized attention: auto, triton, flex, tiled or reference.")
    ] = "auto",
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="The number of prompts to take, from the first on.", show_default="all")
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the first image; each image has the next one.")] = 0,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="The number of denoising steps.", show_default=options.OF_PIPELINE)
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The guidance scale.", show_default=options.OF_PIPELINE)
    ] = None,
    max_sequence_length: options.TextTokens = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The number of images in one call of the pipeline.")] = 1,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric: fid, lpips, clip_i, dino, clip_t, psnr or ssim. May be repeated.",
            show_default="all that can be computed",
        ),
    ] = None,
    clip: Annotated[str, typer.Option(help="The CLIP model: a folder or a Hub id.")] = "openai/clip-vit-large-patch14",
    dino: Annotated[str, typer.Option(help="The DINO or DINOv2 model: a folder or a Hub id.")] = "facebook/dino-vits16",
    download: Annotated[bool, typer.Option("--download", help="Download the missing weights of metrics.")] = False,
    save_images: Annotated[bool, typer.Option("--save-images", help="Keep all images, as PNG files.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Draw what is missing of an unfinished run with the same options.")
    ] = False,
    dtype: options.DType = None,
    device: options.Device = None,
) -> None:
    """Compare a linearized pipeline with the dense one: the same prompts and seeds, the metrics of CLEAR's paper."""
    from clear_attn.tools.evaluate import evaluation
    from clear_attn.tools.evaluate.unfinished import check_output, locked, unfinished_folder
    from clear_attn.utils.prompts import read_prompts

    texts = read_prompts(prompts)[:max_prompts]
    with locked(output_dir):
        check_output(output_dir, resume=resume)
    where = options.select_device(device)
    pipe = options.load_pipeline(model, where, options.select_dtype(dtype, where))
    pipe.set_progress_bar_config(leave=False)
    kept = unfinished_folder(output_dir)
    with on_interrupt(lambda: f"saved {kept}" if kept.is_dir() else "nothing was saved"):
        found = evaluation.evaluate(
            pipe,
            texts,
            output_dir,
            weights=options.none_or(weights),
            metrics=metric,
            **{name: context.params[name] for name in PASSED_ON},
        )
    names = option_names(context)
    found = dataclasses.replace(found, missing={key: spell_options(why, names) for key, why in found.missing.items()})
    unwritten = [name for name in (evaluation.NUMBERS, evaluation.SHEET) if not (output_dir / name).is_file()]
    typer.echo(f"{found}\n\nSaved {output_dir}{', without ' if unwritten else ''}{' and '.join(unwritten)}")
    if unwritten:
        raise typer.Exit(1)
