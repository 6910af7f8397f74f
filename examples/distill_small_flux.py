"""Distils the small FLUX in the box, by each loss of CLEAR in turn, and measures what each brings.

    python examples/distill_small_flux.py --output distilled

The small FLUX draws its own training set. For each variant (window, down_factor) three students are trained: by flow
matching alone, by the difference from the teacher's prediction as well, and by the difference from its attention as
well; the best of them comes with the library. Each draws the captions that nobody was trained on, with the teacher's
seeds; the table shows the mean squared error against the teacher's pictures and how many captions are drawn right.
Stopped, it goes on where it was; once the pictures are drawn, several processes may share the work, each with variants
of its own (`--only 4x1`), and a last run without `--only` writes the table. About three hours on two cores.
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
# The weights of prediction and attention; that of flow matching is 1.
LOSSES = {
    "flow matching": (0.0, 0.0),
    "+ prediction": (0.5, 0.0),
    "+ attention": (0.5, 0.5),
}
PICTURES = 800
SHOWN = 4


def settings(output: Path, folder: Path, window: int, down_factor: int, losses: str, steps: int) -> Settings:
    prediction, attention = LOSSES[losses]
    return Settings(
        pretrained_model_name_or_path=str(demo.path()),
        generate=PICTURES,
        prompts=str(output / "prompts.txt"),
        train_data_dir=str(output / "drawn"),
        latents_dir=str(output / "cache"),
        output_dir=str(folder),
        gradient_checkpointing=False,
        window=window,
        down_factor=down_factor,
        resolution=demo.SIZE,
        max_sequence_length=demo.TEXT_TOKENS,
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


def pictures(file: Path, pipe: FluxPipeline, captions: int) -> np.ndarray:
    """The held-out captions as a pipeline draws them, uint8 `[captions, SIZE, SIZE, 3]`; kept in a file."""
    if not file.exists():
        drawn = np.stack(draw(pipe, held_out_scenes()[:captions], demo.TEXT_TOKENS, batch=25))
        with atomic_file(file) as unfinished, unfinished.open("wb") as opened:  # numpy would add an ending to a name
            np.save(opened, drawn)
    return np.load(file)


def squared_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over all pictures, of values in 0..1."""
    return float(((ours / 255.0 - theirs / 255.0) ** 2).mean())


def table(rows: list[dict]) -> Table:
    shown = Table(
        "window", "down_factor", "weights", "error against the teacher", "of training-free's", "captions right"
    )
    for row in rows:
        free = next(each for each in rows if each["variant"] == row["variant"] and each["weights"] == "training-free")
        share = f"{row['error'] / free['error']:.1%}"
        window, down_factor = row["variant"]
        right = f"{row['right']} of {row['captions']}"
        shown.add_row(str(window), str(down_factor), row["weights"], f"{row['error']:.5f}", share, right)
    return shown


def main(
    output: Annotated[Path, typer.Option(help="Where pictures, weights and results go.")] = Path("distilled"),
    steps: Annotated[int, typer.Option(help="Of training, for each student.")] = 600,
    captions: Annotated[int, typer.Option(help="How many of the held-out captions.")] = 200,
    only: Annotated[list[str] | None, typer.Option(help="Variants, as 4x1; by default all.")] = None,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "prompts.txt").write_text("".join(f"{scene.caption}\n" for scene in training_scenes()))
    variants = [each for each in VARIANTS if not only or f"{each[0]}x{each[1]}" in only]
    pipe = demo.pipeline()
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes()[:captions]
    teacher = pictures(output / f"teacher-{captions}.npy", pipe, captions)
    rows, sheet = [], {"dense": teacher}
    for window, down_factor in variants:
        for weights in ("training-free", *LOSSES):
            folder = folder_of(output, window, down_factor, weights, steps)
            if weights in LOSSES and not (folder / "clear_config.json").exists():
                train(settings(output, folder, window, down_factor, weights, steps))
            folder.mkdir(exist_ok=True)
            with clear.linearized(pipe, window, down_factor, weights=folder if weights in LOSSES else None):
                drawn = pictures(folder / f"pictures-{captions}.npy", pipe, captions)
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
        "pictures": PICTURES,
        "torch": torch.__version__,
        "rows": rows,
    }
    (output / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    images = {label: [Image.fromarray(picture) for picture in drawn[:SHOWN]] for label, drawn in sheet.items()}
    contact_sheet(images, [scene.caption for scene in scenes[:SHOWN]]).save(output / "table.png")


if __name__ == "__main__":
    typer.run(main)
