"""Count the captions that the small FLUX draws right at two and four times its training size.

    weights=src/clear_attn/demo/small_flux_clear
    python examples/highres_small_flux.py --side 256 --captions 20 --weights $weights \\
        --output benchmarks/results/highres_small_flux-256.json
    python examples/highres_small_flux.py --side 512 --captions 4 --weights $weights --sheet docs/highres.png \\
        --output benchmarks/results/highres_small_flux-512.json

Images are drawn directly at that size, dense and linearized, and by `clear_attn.highres`. It runs with the published
settings and with settings for this model, which has memorized its 16 x 16 positions and must stay close to the base
image: guided by the image, step by step by its run, continuing its run, and both. The base images, only enlarged, are
included for comparison.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import FluxPipeline
from PIL import Image

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo.scenes import Scene, held_out_scenes, read
from clear_attn.utils.image_sheets import contact_sheet

REFINED = clear.Stage.preset("refined")
GENTLE = dataclasses.replace(REFINED, low_resolution_guidance=None)
STEPWISE = dataclasses.replace(GENTLE, stepwise_guidance=clear.StepwiseGuidance())
STAGES = {
    "highres, published settings": clear.Stage.preset("published"),
    "highres": REFINED,
    "highres, step by step": STEPWISE,
    "highres, continued": dataclasses.replace(GENTLE, strength=0.2, continues=True),
    "highres, continued, step by step": dataclasses.replace(STEPWISE, continues=True),
}

Draw = Callable[[Scene, int, Image.Image], Image.Image]


def direct(pipe: FluxPipeline, side: int) -> Draw:
    """Return a function that draws text to image at this size."""

    def draw(scene: Scene, seed: int, base: Image.Image) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return pipe(scene.caption, height=side, width=side, generator=generator).images[0]

    return draw


def by_stage(pipe: FluxPipeline, side: int, stage: clear.Stage) -> Draw:
    """Return a function that runs one stage on the base image, with a linearized pipeline.

    A stage that needs the base image's run draws the same base image again.
    """

    def draw(scene: Scene, seed: int, base: Image.Image) -> Image.Image:
        call = {"stages": stage, "seed": seed, "image": None if stage.needs_recording else base}
        return clear.highres(pipe, scene.caption, height=side, width=side, **call).image

    return draw


def enlarged(side: int) -> Draw:
    return lambda scene, seed, base: base.resize((side, side), Image.Resampling.LANCZOS)


def main(
    window: Annotated[int, typer.Option(help="Radius in tokens.")] = 8,
    weights: Annotated[str | None, typer.Option(help="Distilled weights; default: the model's own.")] = None,
    side: Annotated[list[int] | None, typer.Option(help="Side in pixels; repeatable.", show_default="256, 512")] = None,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 20,
    shown: Annotated[int, typer.Option(help="How many of them the contact sheet shows.")] = 4,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    sheet_file: Annotated[Path | None, typer.Option("--sheet", help="Where the contact sheet goes.")] = None,
) -> None:
    pipe = demo.pipeline()
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes()[:captions]
    bases = [direct(pipe, demo.SIZE)(scene, seed, Image.new("RGB", (1, 1))) for seed, scene in enumerate(scenes)]
    rows, sheet = [], {}
    sides = side or [2 * demo.SIZE, 4 * demo.SIZE]
    for pixels in sides:
        for name, local, draw in (
            ("base image, enlarged", False, enlarged(pixels)),
            ("direct, dense", False, direct(pipe, pixels)),
            (f"direct, window {window}", True, direct(pipe, pixels)),
            *((name, True, by_stage(pipe, pixels, stage)) for name, stage in STAGES.items()),
        ):
            with clear.linearized(pipe, window, weights=weights) if local else contextlib.nullcontext():
                drawn = [draw(*each) for each in zip(scenes, range(captions), bases, strict=True)]
            right = sum(read(np.asarray(image)) == scene for scene, image in zip(scenes, drawn, strict=True))
            rows.append({"side": pixels, "how": name, "captions": captions, "right": right})
            print(json.dumps(rows[-1]), flush=True)
            sheet[f"{name}, {pixels} px"] = drawn[:shown]
    if output:
        settings = {name: dataclasses.asdict(stage) for name, stage in STAGES.items()}
        record = {"window": window, "weights": weights, "stages": settings, "rows": rows}
        output.write_text(json.dumps(record, indent=1) + "\n")
    if sheet_file:
        large = {name: images for name, images in sheet.items() if name.endswith(f"{sides[-1]} px")}
        contact_sheet(large, [scene.caption for scene in scenes[:shown]]).save(sheet_file)


if __name__ == "__main__":
    typer.run(main)
