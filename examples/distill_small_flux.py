"""Distill the small FLUX with each loss of CLEAR in turn, and measure the effect.

    python examples/distill_small_flux.py --output distilled

The small FLUX draws its own training set. For each variant (window, down_factor) three students are trained: with flow
matching alone, with the error against the teacher's prediction too, and with the error against its attention too. The
library contains the best one for window 8. Each student draws the held-out captions with the teacher's seeds. The table
shows the mean squared error against the teacher's images, and the number of captions drawn right.

An interrupted run continues where it stopped. Once the images are drawn, several processes can share the work, each
with its own variants (`--only 4x1`). A last run without `--only` writes the table. About three hours on two cores.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import FluxPipeline
from PIL import Image
from rich import print
from rich.table import Table

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo.scenes import held_out_scenes, training_scenes
from clear_attn.distill import Settings, train
from clear_attn.utils.atomic import atomic_file
from clear_attn.utils.image_sheets import contact_sheet
from evaluate_small_flux import count_right, draw

VARIANTS = ((2, 1), (4, 1), (8, 1), (2, 4))  # window, down_factor
# Weights of the prediction and attention losses; flow matching has weight 1.
LOSSES = {
    "flow matching": (0.0, 0.0),
    "+ prediction": (0.5, 0.0),
    "+ attention": (0.5, 0.5),
}
TRAINING_IMAGES = 800
SHOWN = 4


def settings(output: Path, folder: Path, window: int, down_factor: int, losses: str, steps: int) -> Settings:
    prediction, attention = LOSSES[losses]
    return Settings(
        pretrained_model_name_or_path=str(demo.path()),
        generate=TRAINING_IMAGES,
        prompts=str(output / "prompts.txt"),
        train_data_dir=str(output / "drawn"),
        latents_dir=str(output / "cache"),
        output_dir=str(folder),
        gradient_checkpointing=False,
        window=window,
        down_factor=down_factor,
        train_batch_size=8,
        max_train_steps=steps,
        lr_scheduler="cosine",
        prediction_weight=prediction,
        attention_weight=attention,
        checkpointing_steps=100,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        report_to="none",
    )


def folder_of(output: Path, window: int, down_factor: int, weights: str, steps: int) -> Path:
    trained = f"-{steps}-steps" if weights in LOSSES else ""
    return output / f"{window}x{down_factor}-{weights.removeprefix('+ ').replace(' ', '-')}{trained}"


def cached_images(file: Path, pipe: FluxPipeline, captions: int) -> np.ndarray:
    """Return the held-out captions as a pipeline draws them, uint8 `[captions, SIZE, SIZE, 3]`, cached in a file."""
    if not file.exists():
        drawn = np.stack(draw(pipe, held_out_scenes()[:captions], demo.TEXT_TOKENS, batch=25))
        with atomic_file(file) as unfinished, unfinished.open("wb") as opened:  # numpy adds a suffix to a name
            np.save(opened, drawn)
    return np.load(file)


def squared_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the mean squared error over all images, of values in 0..1."""
    return float(((ours / 255.0 - theirs / 255.0) ** 2).mean())


def table(rows: list[dict]) -> Table:
    shown = Table(
        "window", "down_factor", "weights", "error against the teacher", "share of training-free", "captions right"
    )
    for row in rows:
        free = next(each for each in rows if each["variant"] == row["variant"] and each["weights"] == "training-free")
        share = f"{row['error'] / free['error']:.1%}"
        window, down_factor = row["variant"]
        right = f"{row['right']} of {row['captions']}"
        shown.add_row(str(window), str(down_factor), row["weights"], f"{row['error']:.5f}", share, right)
    return shown


def main(
    output: Annotated[Path, typer.Option(help="Folder for images, weights and results.")] = Path("distilled"),
    steps: Annotated[int, typer.Option(help="Training steps of each student.")] = 600,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 200,
    only: Annotated[list[str] | None, typer.Option(help="Variants such as 4x1; default: all.")] = None,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "prompts.txt").write_text("".join(f"{scene.caption}\n" for scene in training_scenes()))
    variants = [each for each in VARIANTS if not only or f"{each[0]}x{each[1]}" in only]
    pipe = demo.pipeline()
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes()[:captions]
    teacher = cached_images(output / f"teacher-{captions}.npy", pipe, captions)
    rows, sheet = [], {"dense": teacher}
    for window, down_factor in variants:
        for weights in ("training-free", *LOSSES):
            folder = folder_of(output, window, down_factor, weights, steps)
            if weights in LOSSES and not (folder / "clear_config.json").exists():
                train(settings(output, folder, window, down_factor, weights, steps))
            folder.mkdir(exist_ok=True)
            with clear.linearized(pipe, window, down_factor, weights=folder if weights in LOSSES else None):
                drawn = cached_images(folder / f"images-{captions}.npy", pipe, captions)
            rows.append(
                {
                    "variant": (window, down_factor),
                    "weights": weights,
                    "error": squared_error(drawn, teacher),
                    **count_right(scenes, list(drawn)),
                }
            )
            sheet[f"window {window}, down_factor {down_factor}\n{weights}"] = drawn
            print(table(rows))
    if only:
        return
    result = {
        "teacher": count_right(scenes, list(teacher)),
        "steps": steps,
        "images": TRAINING_IMAGES,
        "torch": torch.__version__,
        "rows": rows,
    }
    (output / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    shown = {label: [Image.fromarray(image) for image in drawn[:SHOWN]] for label, drawn in sheet.items()}
    contact_sheet(shown, [scene.caption for scene in scenes[:SHOWN]]).save(output / "table.png")


if __name__ == "__main__":
    typer.run(main)
