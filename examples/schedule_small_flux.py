"""Count the captions that the small FLUX draws right with a small window, its own weights, and dense steps or layers.

    python examples/schedule_small_flux.py --output benchmarks/results/schedule_small_flux.json \\
        --sheet docs/schedule.png

The weights were trained with dense attention, so a window of 8 of the 32 x 32 tokens spoils most images. A schedule
keeps the first steps dense, or some of the layers. Each caption has its own seed.
"""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from diffusers import FluxPipeline
from PIL import Image

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo.scenes import held_out_scenes
from clear_attn.utils.image_sheets import contact_sheet
from evaluate_small_flux import STEPS, captions_of, draw, score

FIRST = (4, 7, 14)


def schedules(pipe: FluxPipeline) -> dict[str, clear.Schedule]:
    """Return the schedules to compare, by name."""
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))  # as the pipeline does
    first = {
        f"the first {steps} of {STEPS} steps dense": clear.Schedule(clear.sigma_after_step(pipe.scheduler, steps))
        for steps in FIRST
    }
    return {
        "all local": clear.Schedule(),
        **first,
        "the 2 double blocks dense": clear.Schedule(dense_layers=("transformer_blocks",)),
        "the 4 single blocks dense": clear.Schedule(dense_layers=("single_transformer_blocks",)),
        "the first single block dense": clear.Schedule(dense_layers=("single_transformer_blocks.0",)),
        "the first single block has window 16": clear.Schedule(windows={"single_transformer_blocks.0": 16}),
    }


def main(
    window: Annotated[int, typer.Option(help="Radius in tokens.")] = 8,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 20,
    shown: Annotated[int, typer.Option(help="How many of them the contact sheet shows.")] = 4,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    sheet_file: Annotated[Path | None, typer.Option("--sheet", help="Where the contact sheet goes.")] = None,
) -> None:
    pipe = demo.pipeline()
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(captions)
    ways = {"dense attention": contextlib.nullcontext()}
    for name, schedule in schedules(pipe).items():
        ways[name] = clear.linearized(pipe, window, weights=None, schedule=schedule)
    rows, sheet = [], {}
    for name, way in ways.items():
        with way:
            drawn = draw(pipe, scenes, demo.TEXT_TOKENS, batch=10)
        rows.append({"how": name, "captions": captions, "right": score(scenes, drawn)["right"]})
        print(json.dumps(rows[-1]), flush=True)
        sheet[name] = [Image.fromarray(image) for image in drawn[:shown]]
    if output:
        output.write_text(json.dumps({"window": window, "steps": STEPS, "rows": rows}, indent=1) + "\n")
    if sheet_file:
        contact_sheet(sheet, captions_of(scenes[:shown])).save(sheet_file)


if __name__ == "__main__":
    typer.run(main)
