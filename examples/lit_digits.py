"""LiT in its own field: a small class-conditional DiT on handwritten digits, and its students with linear attention.

    python examples/lit_digits.py --output benchmarks/results/lit_digits.json --picture docs/lit-digits.png

trains the teacher with softmax attention, and students for each of LiT's guidelines (arXiv 2501.12976): few heads, a
convolution, what is inherited, what is distilled. All is seeded. Each run is kept when it is done, its numbers in
the output and what it learned in the folder; called again, the script goes on with the next.
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

import clear_attn as clear
import digits
from clear_attn.pictures import CELL, contact_sheet
from digits import Digits, Judge, Noisy, Prediction

SHARES = (1 / 10, 1 / 5, 1 / 3)  # of the teacher's steps, at which models are judged
BEYOND = 4 / 3  # to which the teacher itself is trained on, for comparison
TEACHER, SEED = "teacher", 0


class Student(NamedTuple):
    """How a student is made.

    Attributes:
        heads: of its linear attention.
        kernel_size: of its convolution, 0 for none.
        inherits: from the teacher: "all", "all but attention" or "nothing".
        noise, variance: the weights of the teacher's predictions in its loss, beside the loss of the data.
    """

    heads: int = 2
    kernel_size: int = 5
    inherits: str = "all but attention"
    noise: float = 1.0
    variance: float = 1.0


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


def make_student(teacher: DiTTransformer2DModel, kind: Student) -> DiTTransformer2DModel:
    """Linear attention in place of the teacher's, untrained; the teacher stays as it is."""
    student = digits.new_model(SEED + 1) if kind.inherits == "nothing" else copy.deepcopy(teacher)
    if kind.inherits == "all but attention":
        torch.manual_seed(SEED + 1)
        for block in student.transformer_blocks:
            for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out[0]):
                projection.reset_parameters()
    return clear.linearize(student, method=clear.methods.LiT(kind.heads, kind.kernel_size), weights=None)


def teacher_loss(prediction: Prediction, noisy: Noisy) -> torch.Tensor:
    """Of the data alone: the noise's error, and the bound for the variance (arXiv 2102.09672, equation 16)."""
    return digits.noise_error(prediction, noisy) + digits.bound(prediction, noisy, digits.scheduler())


def student_loss(kind: Student, teacher: DiTTransformer2DModel) -> Callable[[Prediction, Noisy], torch.Tensor]:
    """LiT's hybrid distillation: of the data, and of what the teacher predicts of the same noisy digits."""

    def loss(prediction: Prediction, noisy: Noisy) -> torch.Tensor:
        with torch.no_grad():
            wanted = digits.predict(teacher, noisy)
        noise, variance = (F.mse_loss(own, other) for own, other in zip(prediction, wanted, strict=True))
        return teacher_loss(prediction, noisy) + kind.noise * noise + kind.variance * variance

    return loss


class Experiment:
    """The runs, and where what they found is kept.

    Args:
        output: the numbers, JSON.
        folder: models and digits drawn, by run.
        settings: all that the numbers depend on.

    Raises:
        ValueError: the output holds numbers of other settings.
    """

    def __init__(self, output: Path, folder: Path, settings: dict[str, int]) -> None:
        self.output, self.folder, self.settings = output, folder, settings
        self.kept = json.loads(output.read_text()) if output.exists() else {"settings": settings, "rows": []}
        if self.kept["settings"] != settings:
            raise ValueError(
                f"{output} holds numbers of other settings, {self.kept['settings']}, than {settings}; give these, or "
                "another --output"
            )
        folder.mkdir(parents=True, exist_ok=True)

    def is_done(self, name: str) -> bool:
        return any(row["model"] == name for row in self.kept["rows"])

    def keep(self, *rows: dict) -> None:
        self.kept["rows"] += rows
        self.output.write_text(json.dumps(self.kept, indent=1) + "\n")
        for row in rows:
            print(json.dumps(row), flush=True)

    def path(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-").replace(",", "")


class Quality(NamedTuple):
    """Measures digits against those held out."""

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
    experiment: Experiment,
    quality: Quality,
    seen: Digits,
    name: str,
    model: DiTTransformer2DModel,
    loss: Callable[[Prediction, Noisy], torch.Tensor],
    checkpoints: list[int],
    saved_at: int,
) -> None:
    """Trains a model, judges it at its checkpoints, and keeps rows, and the digits and weights of one of them."""
    rows = []
    for step in digits.train(model, loss, seen, digits.scheduler(), checkpoints, SEED, name):
        found, drawn = quality.of_model(model)
        rows.append({"model": name, "steps": step, **found})
        if step == saved_at:
            save_file({"pictures": drawn.pictures[: digits.CLASSES]}, experiment.path(name).with_suffix(".safetensors"))
            if name == TEACHER:
                model.save_pretrained(experiment.path(name))
    experiment.keep(*rows)


def picture(experiment: Experiment, held_out: Digits, names: dict[str, str]) -> Image.Image:
    """A row of real digits, and one of each of some runs."""
    order = [int((held_out.labels == digit).nonzero()[0]) for digit in range(digits.CLASSES)]
    rows = {"real, held out": held_out.pictures[order]}
    for label, name in names.items():
        rows[label] = load_file(experiment.path(name).with_suffix(".safetensors"))["pictures"]
    return contact_sheet(
        {label: [_show(each) for each in pictures] for label, pictures in rows.items()},
        [str(digit) for digit in range(digits.CLASSES)],
    )


def _show(digit: torch.Tensor) -> Image.Image:
    grey = ((digit[0] + 1) * 127.5).round().byte().numpy()
    return Image.fromarray(255 - grey).resize((CELL, CELL), Image.Resampling.NEAREST)


def main(
    output: Annotated[Path, typer.Option(help="Where the numbers go as JSON, and are read from.")],
    folder: Annotated[Path, typer.Option(help="Where models and digits are kept.")] = Path("lit-digits"),
    picture_path: Annotated[Path | None, typer.Option("--picture", help="Where the picture goes.")] = None,
    steps: Annotated[int, typer.Option(help="Of the teacher's training.")] = 3000,
    count: Annotated[int, typer.Option(help="How many digits are drawn to judge a model.")] = 500,
    drawing_steps: Annotated[int, typer.Option(help="Of 1000, in which they are drawn.")] = 25,
    digits_a_timestep: Annotated[int, typer.Option(help="Held-out digits for the bound.")] = 4,
    epochs: Annotated[int, typer.Option(help="Of the judge's training.")] = 40,
) -> None:
    settings = {
        "steps": steps,
        "count": count,
        "drawing_steps": drawing_steps,
        "digits_a_timestep": digits_a_timestep,
        "epochs": epochs,
    }
    experiment = Experiment(output, folder, settings)
    seen, held_out = digits.load()
    quality = Quality(digits.train_judge(seen, epochs), held_out, settings)
    *few, third = (round(share * steps) for share in SHARES)
    if not experiment.is_done("real"):
        experiment.keep(
            {"model": "real", "digits": "held out", "accuracy": round(quality.judge.accuracy(held_out), 4)},
            {"model": "real", "digits": "trained with", **quality.of(seen)},
        )
    if not experiment.is_done(TEACHER):
        checkpoints = [*few, third, steps, round(BEYOND * steps)]
        run(experiment, quality, seen, TEACHER, digits.new_model(SEED), teacher_loss, checkpoints, steps)
    teacher = DiTTransformer2DModel.from_pretrained(experiment.path(TEACHER)).requires_grad_(False)
    for name, kind in STUDENTS.items():
        if not experiment.is_done(name):
            checkpoints = [*few, third] if name == LIT else few
            student = make_student(teacher, kind)
            run(experiment, quality, seen, name, student, student_loss(kind, teacher), checkpoints, checkpoints[-1])
    if picture_path:
        rows = {f"teacher, {steps} steps": TEACHER, f"LiT, {third} steps": LIT, "no convolution": "no convolution"}
        picture(experiment, held_out, rows).save(picture_path)


if __name__ == "__main__":
    typer.run(main)
