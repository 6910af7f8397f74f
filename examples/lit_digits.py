"""Distill a small class-conditional DiT on handwritten digits to linear attention, as LiT does.

    python examples/lit_digits.py --output benchmarks/results/lit_digits.json --sheet docs/lit-digits.png

trains the teacher with softmax attention, and students for each of LiT's guidelines (arXiv 2501.12976): few heads, a
convolution, inheritance and distillation. Everything is seeded. Finished runs are saved in a folder, and the next call
continues from there. The teacher takes about 10 minutes on one core, a student 2 or 3. `--only` divides the students
among several calls.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from diffusers import DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import clear_attn as clear
import digits
from clear_attn.utils.atomic import atomic_text
from clear_attn.utils.image_sheets import CELL, contact_sheet
from digits import Digits, Judge, Noisy, Prediction

SHARES = (1 / 10, 1 / 5, 1 / 3)  # of the teacher's steps, at which models are evaluated
BEYOND = 4 / 3  # of its steps, to which the teacher continues for comparison
ABLATED = 2  # the number of these shares for the other students
REAL, TEACHER, SEED = "real", "teacher", 0
SCHEDULE = digits.scheduler()


class Student(NamedTuple):
    """The settings of a student.

    Attributes:
        heads: of its linear attention.
        kernel_size: of its convolution, 0 for none.
        inherits: what it takes from the teacher, "all", "all but attention" or "nothing".
        noise, variance: weights of the teacher's predictions in its loss; the data has weight 1.
        seed: for new parameters and training.
    """

    heads: int = 2
    kernel_size: int = 5
    inherits: str = "all but attention"
    noise: float = 1.0
    variance: float = 1.0
    seed: int = SEED + 1


LIT = "LiT"
STUDENTS = {
    LIT: Student(),
    "no convolution": Student(kernel_size=0),
    "attention inherited too": Student(inherits="all"),
    "nothing inherited": Student(inherits="nothing"),
    "nothing distilled": Student(noise=0, variance=0),
    "no variance distilled": Student(variance=0),
    "1 head": Student(heads=1),
    "4 heads, as the teacher": Student(heads=4),
}
# The difference between two seeds is chance.
STUDENTS |= {f"{name}, another seed": kind._replace(seed=SEED + 11) for name, kind in STUDENTS.items()}


def make_student(teacher: DiTTransformer2DModel, kind: Student) -> DiTTransformer2DModel:
    """Return an untrained student with linear attention; the teacher is not changed."""
    student = digits.new_model(kind.seed) if kind.inherits == "nothing" else copy.deepcopy(teacher)
    if kind.inherits == "all but attention":
        torch.manual_seed(kind.seed)
        for block in student.transformer_blocks:
            for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out[0]):
                projection.reset_parameters()
    return clear.linearize(student, method=clear.methods.LiT(kind.heads, kind.kernel_size), weights=None)


def teacher_loss(prediction: Prediction, noisy: Noisy) -> torch.Tensor:
    """Return the loss on data: the noise's error, and the bound for the variance (arXiv 2102.09672, equation 16)."""
    return digits.noise_error(prediction, noisy) + digits.bound(prediction, noisy, SCHEDULE)


def student_loss(kind: Student, teacher: DiTTransformer2DModel) -> Callable[[Prediction, Noisy], torch.Tensor]:
    """Return LiT's hybrid loss: on data, and on the teacher's predictions for the same noisy digits."""

    def loss(prediction: Prediction, noisy: Noisy) -> torch.Tensor:
        with torch.no_grad():
            wanted = digits.predict(teacher, noisy)
        noise, variance = (F.mse_loss(own, other) for own, other in zip(prediction, wanted, strict=True))
        return teacher_loss(prediction, noisy) + kind.noise * noise + kind.variance * variance

    return loss


class Kept:
    """A folder with the results of each run: rows, some digits, and the teacher's model.

    Args:
        folder: created if missing.
        settings: everything that the numbers depend on.

    Raises:
        ValueError: the folder holds runs of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, int]) -> None:
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        file = self.path("settings", ".json")
        if file.exists() and json.loads(file.read_text()) != settings:
            raise ValueError(
                f"{folder} holds runs of other settings, {file.read_text()}; give these, or another --folder"
            )
        atomic_text(file, json.dumps(settings))  # others may be reading

    def path(self, name: str, suffix: str = "") -> Path:
        return self.folder / (name.replace(" ", "-").replace(",", "") + suffix)

    def rows(self, name: str) -> list[dict]:
        """Return the rows of a run; none if it is not finished."""
        file = self.path(name, ".json")
        return json.loads(file.read_text()) if file.exists() else []

    def keep(self, name: str, rows: list[dict]) -> None:
        atomic_text(self.path(name, ".json"), json.dumps(rows))


class Quality(NamedTuple):
    """Compares digits with those held out."""

    judge: Judge
    held_out: Digits
    settings: dict[str, int]

    def of(self, drawn: Digits) -> dict[str, float]:
        return {
            "accuracy": round(self.judge.accuracy(drawn), 4),
            "frechet": round(self.judge.distance(self.held_out, drawn), 2),
        }

    def of_model(self, model: DiTTransformer2DModel) -> tuple[dict[str, float], Digits]:
        drawn = digits.draw(model, self.settings["count"], self.settings["drawing_steps"], SEED + 2)
        bits = digits.bits(model, self.held_out, self.settings["digits_a_timestep"], SEED + 3)
        return {**self.of(drawn), "bits": round(bits, 4)}, drawn


def run(
    kept: Kept,
    quality: Quality,
    seen: Digits,
    name: str,
    model: DiTTransformer2DModel,
    loss: Callable[[Prediction, Noisy], torch.Tensor],
    checkpoints: list[int],
    saved_at: int,
    seed: int,
) -> None:
    """Train a model, evaluate it at its checkpoints, and save the rows; at one also digits, or the teacher's model."""
    rows = []
    for step in digits.train(model, loss, seen, SCHEDULE, checkpoints, seed, name):
        found, drawn = quality.of_model(model)
        rows.append({"model": name, "steps": step, **found})
        tqdm.write(json.dumps(rows[-1]))
        if step == saved_at:
            save_file({"images": drawn.images[: digits.CLASSES].clone()}, kept.path(name, ".safetensors"))
            if name == TEACHER:
                model.save_pretrained(kept.path(name))
    kept.keep(name, rows)


def make_sheet(kept: Kept, held_out: Digits, names: dict[str, str]) -> Image.Image:
    """Return a contact sheet: a row of real digits, and one for each of some runs."""
    order = [int((held_out.labels == digit).nonzero()[0]) for digit in range(digits.CLASSES)]
    rows = {"real, held out": held_out.images[order]}
    for label, name in names.items():
        rows[label] = load_file(kept.path(name, ".safetensors"))["images"]
    return contact_sheet(
        {label: [_show(each) for each in images] for label, images in rows.items()},
        [str(digit) for digit in range(digits.CLASSES)],
    )


def _show(digit: torch.Tensor) -> Image.Image:
    gray = ((digit[0] + 1) * 127.5).round().byte().numpy()
    return Image.fromarray(255 - gray).resize((CELL, CELL), Image.Resampling.NEAREST)


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the numbers.")],
    folder: Annotated[Path, typer.Option(help="Folder for runs.")] = Path("lit-digits"),
    sheet_file: Annotated[Path | None, typer.Option("--sheet", help="Where the contact sheet goes.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Names of runs, to divide them among several calls.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of the teacher.")] = 3000,
    count: Annotated[int, typer.Option(help="Number of digits drawn to evaluate a model.")] = 500,
    drawing_steps: Annotated[int, typer.Option(help="Denoising steps, of 1000 timesteps.")] = 25,
    digits_a_timestep: Annotated[int, typer.Option(help="Held-out digits for the bound.")] = 4,
    epochs: Annotated[int, typer.Option(help="Training epochs of the classifier.")] = 40,
) -> None:
    settings = {
        "steps": steps,
        "count": count,
        "drawing_steps": drawing_steps,
        "digits_a_timestep": digits_a_timestep,
        "epochs": epochs,
    }
    names = [TEACHER, *STUDENTS]
    if unknown := set(only or ()) - set(names):
        raise typer.BadParameter(f"no runs are named {sorted(unknown)}, but {names}")
    kept = Kept(folder, settings)
    seen, held_out = digits.load()
    quality = Quality(digits.train_judge(seen, epochs), held_out, settings)
    kept.keep(
        REAL,
        [
            {"model": REAL, "digits": "held out", "accuracy": round(quality.judge.accuracy(held_out), 4)},
            {"model": REAL, "digits": "trained with", **quality.of(seen)},
        ],
    )
    checkpoints = [round(share * steps) for share in SHARES]
    for name in only or names:
        if kept.rows(name):
            continue
        if name == TEACHER:
            own = [*checkpoints, steps, round(BEYOND * steps)]
            run(kept, quality, seen, name, digits.new_model(SEED), teacher_loss, own, steps, SEED)
        else:
            own = checkpoints if name == LIT else checkpoints[:ABLATED]
            teacher = DiTTransformer2DModel.from_pretrained(kept.path(TEACHER)).requires_grad_(False)
            kind = STUDENTS[name]
            student, loss = make_student(teacher, kind), student_loss(kind, teacher)
            run(kept, quality, seen, name, student, loss, own, own[-1], kind.seed)
    rows = [row for name in (REAL, *names) for row in kept.rows(name)]
    output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    if sheet_file:
        shown = {f"teacher, {steps} steps": TEACHER, f"LiT, {checkpoints[-1]} steps": LIT}
        make_sheet(kept, held_out, shown).save(sheet_file)


if __name__ == "__main__":
    typer.run(main)
