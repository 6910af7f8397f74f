"""The command `clear-attn eval`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clear_attn.tools import options


def evaluate(
    model: options.Model,
    prompts: Annotated[Path, options.input_file("A text file with a prompt per line.")],
    output_dir: Annotated[Path, typer.Option(help="A new or an empty folder for the result.")],
    weights: options.Weights = "auto",
    window: options.Window = None,
    down_factor: options.DownFactor = None,
    backend: Annotated[str, typer.Option(help="What computes linearized attention.")] = "auto",
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Take only the first prompts.", show_default="all")
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; each image has the next.")] = 0,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.", show_default=options.OF_PIPELINE)
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance.", show_default=options.OF_PIPELINE)] = None,
    max_sequence_length: options.TextTokens = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="fid, lpips, clip_i, dino, clip_t, psnr or ssim; may be repeated.",
            show_default="all that can be",
        ),
    ] = None,
    clip: Annotated[str, typer.Option(help="Folder or Hub id of CLIP.")] = "openai/clip-vit-large-patch14",
    dino: Annotated[str, typer.Option(help="Folder or Hub id of DINO or DINOv2.")] = "facebook/dino-vits16",
    download: Annotated[bool, typer.Option("--download", help="Download missing weights of metrics.")] = False,
    save_images: Annotated[bool, typer.Option("--save-images", help="Keep all images as PNG.")] = False,
    dtype: options.DType = None,
    device: options.Device = None,
) -> None:
    """Compare a linearized pipeline with the dense one: the same prompts and seeds, the metrics of CLEAR's paper."""
    from clear_attn.tools.evaluate import evaluation
    from clear_attn.utils.atomic import check_empty
    from clear_attn.utils.prompts import read_prompts

    texts = read_prompts(prompts)[:max_prompts]
    check_empty(output_dir)
    where = options.select_device(device)
    pipe = options.load_pipeline(model, where, options.select_dtype(dtype, where))
    pipe.set_progress_bar_config(leave=False)
    found = evaluation.evaluate(
        pipe,
        texts,
        output_dir,
        weights=options.none_or(weights),
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
        save_images=save_images,
    )
    typer.echo(f"{found}\n\nSaved {output_dir}")
