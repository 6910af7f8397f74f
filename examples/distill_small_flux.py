"""Distill the small FLUX for several windows, and measure the effect.

    python examples/distill_small_flux.py --output distilled

The training set is drawn scenes. The losses are flow matching and the errors against the teacher's prediction and
attention; `VARIANTS` can name more students, with fewer of them. The library contains the students, in bfloat16, from
the folder "package". Each draws the held-out captions with the teacher's seeds. The table shows the mean squared error
against the teacher's images, and the number of captions drawn right.

An interrupted run continues where it stopped. Once the latents are cached, several processes can share the work, each
with its own variants (`--only 4x1`). A last run without `--only` writes the table.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import FluxPipeline
from PIL import Image
from rich import print
from rich.table import Table

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo import scenes as demo_scenes
from clear_attn.demo.scenes import held_out_scenes, poses, training_scenes
from clear_attn.distill import Settings, train
from clear_attn.models._diffusers import load_pretrained
from clear_attn.utils.atomic import atomic_file
from clear_attn.utils.image_sheets import contact_sheet
from clear_attn.weights.packaged import FOLDERS
from evaluate_small_flux import FEWER_STEPS, captions_of, draw, load, score

# Weights of the prediction and attention losses; flow matching has weight 1.
LOSSES = {
    "flow matching": (0.0, 0.0),
    "+ prediction": (0.5, 0.0),
    "+ attention": (0.5, 0.5),
}
ALL = "+ attention"
FREE = "training-free"
# The students of each window and down_factor, by their losses.
VARIANTS = {(4, 1): (ALL,), (8, 1): (ALL,), (16, 1): (ALL,), (8, 4): (ALL,)}
# After 400 steps, window 8 draws 184 of the 200 captions right in 28 steps.
STEPS, MORE_STEPS = 400, {(8, 1): 900}
# The package's weights for window 8 were trained on an H200, with 1,001.
TRAINING_IMAGES = 1000
SHOWN = 4


def draw_training_set(folder: Path, seed: int = 100) -> None:
    """Write drawn scenes and their captions, in the layout of an image folder of the datasets library."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "metadata.jsonl").exists():
        return
    rng = np.random.default_rng(seed)
    scenes = training_scenes(TRAINING_IMAGES, seed)
    lines = []
    for number, (scene, caption) in enumerate(zip(scenes, captions_of(scenes), strict=True)):
        name = f"{number:05d}.png"
        image = demo_scenes.draw(scene, demo.SIZE, poses(scene, rng))
        Image.fromarray(image).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    with atomic_file(folder / "metadata.jsonl") as unfinished:
        unfinished.write_text("\n".join(lines) + "\n")


def settings(output: Path, folder: Path, model: Path, steps: int, **changes: Any) -> Settings:
    """Return the settings of a student; images and their latents are shared by all in the output folder."""
    return Settings(
        pretrained_model_name_or_path=str(model),
        train_data_dir=str(output / "images"),
        latents_dir=str(output / "cache"),
        output_dir=str(folder),
        max_sequence_length=demo.TEXT_TOKENS,
        gradient_checkpointing=False,
        mixed_precision="no",  # on a GPU too
        train_batch_size=4,
        max_train_steps=steps,
        lr_scheduler="cosine",
        checkpointing_steps=20,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        report_to="none",
        **changes,
    )


def train_student(output: Path, folder: Path, model: Path, steps: int, variant: tuple[int, int], losses: str) -> None:
    (window, down_factor), (prediction, attention) = variant, LOSSES[losses]
    changes = {
        "window": window,
        "down_factor": down_factor,
        "prediction_weight": prediction,
        "attention_weight": attention,
    }
    train(settings(output, folder, model, steps, **changes))


def package(output: Path, model: Path, variant: tuple[int, int]) -> None:
    """Save a variant's last student in bfloat16, as the library contains it."""
    pipe = load_pretrained(FluxPipeline, model, dtype=torch.bfloat16, local_files_only=True)
    clear.linearize(pipe, weights=student_folder(output, variant, ALL))
    clear.save_pretrained(pipe, output / "package" / FOLDERS[variant])


def student_folder(output: Path, variant: tuple[int, int], losses: str) -> Path:
    window, down_factor = variant
    return output / f"{window}x{down_factor}-{losses.removeprefix('+ ').replace(' ', '-')}"


def training_facts(student: Path) -> dict[str, int]:
    training = json.loads((student / "clear_config.json").read_text())["training"]
    return {name: training[name] for name in ("steps", "images")}


def cached_images(file: Path, pipe: FluxPipeline, captions: int) -> np.ndarray:
    """Return the held-out captions as a pipeline draws them, uint8 `[captions, SIZE, SIZE, 3]`, cached in a file."""
    if not file.exists():
        drawn = np.stack(draw(pipe, held_out_scenes(captions), demo.TEXT_TOKENS, batch=10, steps=FEWER_STEPS))
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
        free = next(each for each in rows if each["variant"] == row["variant"] and each["weights"] == FREE)
        share = f"{row['error'] / free['error']:.1%}"
        window, down_factor = row["variant"]
        right = f"{row['right']} of {row['captions']}"
        shown.add_row(str(window), str(down_factor), row["weights"], f"{row['error']:.5f}", share, right)
    return shown


def main(
    output: Annotated[Path, typer.Option(help="Folder for images, weights and results.")] = Path("distilled"),
    model: Annotated[Path | None, typer.Option(help="Folder of the pipeline; default: the one in the package.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each student.", show_default="400, for 8x1 900")
    ] = None,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 200,
    only: Annotated[list[str] | None, typer.Option(help="Variants such as 4x1; default: all.")] = None,
) -> None:
    named = {f"{window}x{down_factor}": (window, down_factor) for window, down_factor in VARIANTS}
    if unknown := set(only or ()) - named.keys():
        raise typer.BadParameter(f"{unknown.pop()!r} is none of {', '.join(named)}", param_hint="--only")
    variants = [named[name] for name in only or named]
    draw_training_set(output / "images")
    folder_of_model = model or demo.path()
    pipe = load(folder_of_model)
    scenes = held_out_scenes(captions)
    teacher = cached_images(output / f"teacher-{captions}.npy", pipe, captions)
    rows, sheet = [], {"dense": teacher}
    for variant in variants:
        for weights in (FREE, *VARIANTS[variant]):
            window, down_factor = variant
            folder = student_folder(output, variant, weights)
            if weights != FREE and not (folder / "clear_config.json").exists():
                count = steps or MORE_STEPS.get(variant, STEPS)
                train_student(output, folder, folder_of_model, count, variant, weights)
            folder.mkdir(exist_ok=True)
            with clear.linearized(pipe, window, down_factor, weights=folder if weights != FREE else None):
                drawn = cached_images(folder / f"images-{captions}.npy", pipe, captions)
            rows.append(
                {
                    "variant": variant,
                    "weights": weights,
                    **(training_facts(folder) if weights != FREE else {}),
                    "error": squared_error(drawn, teacher),
                    **score(scenes, list(drawn)),
                }
            )
            label = "distilled" if weights == ALL else weights
            sheet[f"window {window}, down_factor {down_factor}\n{label}"] = drawn
            print(table(rows))
        package(output, folder_of_model, variant)
    if only:
        return
    result = {
        "teacher": score(scenes, list(teacher)),
        "drawing_steps": FEWER_STEPS,
        "torch": torch.__version__,
        "rows": rows,
    }
    (output / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    shown = {label: [Image.fromarray(image) for image in drawn[:SHOWN]] for label, drawn in sheet.items()}
    contact_sheet(shown, captions_of(scenes[:SHOWN])).save(output / "table.png")


if __name__ == "__main__":
    typer.run(main)
