"""What an evaluation found: numbers as a table and as JSON, and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clear_attn.methods.records import method_from_dict
from clear_attn.tools.evaluate.metric_registry import METRICS
from clear_attn.tools.evaluate.metrics import STUDENT, TEACHER
from clear_attn.utils.image_sheets import contact_sheet
from clear_attn.utils.tables import format_table

IMAGES_ON_SHEET = 6
ARROWS = {"higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Evaluation:
    """Numbers of two rows, `"teacher"` and `"student"`.

    Attributes:
        settings: the settings of pipeline and student.
        versions: the versions of the libraries.
        seconds: for each row, `"total"` of all images and the median `"per_image"`; the student's first batch may
            include a compilation.
        means: the mean by metric and row; metrics that compare with the teacher have only the student's row.
        missing: the reason why a metric was not computed, by metric.
        images: for each image `"prompt"`, `"seed"`, and for each row the numbers by metric.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, dict[str, float]]
    means: dict[str, dict[str, float]]
    missing: dict[str, str]
    images: list[dict[str, Any]]

    @property
    def student(self) -> str:
        """The student in words."""
        method = method_from_dict(self.settings["method"])
        free = ", training-free" if self.settings["weights"] is None else ""
        return f"{method.title}, {method.as_arguments()}{free}"

    def to_json(self) -> str:
        """Return the text of an eval.json. Infinite numbers, which JSON does not have, become the text `"inf"`."""
        metrics = {
            name: {
                **{field: getattr(METRICS[name], field) for field in ("title", "better", "meaning")},
                **(self.means[name] if name in self.means else {"missing": self.missing[name]}),
            }
            for name in self._names()
        }
        fields = {name: getattr(self, name) for name in ("settings", "versions", "seconds", "images")}
        finite = json.loads(
            json.dumps({**fields, "metrics": metrics}), parse_constant=lambda constant: str(float(constant))
        )
        return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        names = self._names()
        header = [
            f"{len(self.images)} images of {self.settings['width']} x {self.settings['height']} px",
            *(f"{METRICS[name].title} {ARROWS[METRICS[name].better]}" for name in names),
            "s / image",
        ]
        rows = [
            [label, *(self._cell(name, row) for name in names), f"{self.seconds[row]['per_image']:.3g}"]
            for row, label in ((TEACHER, "dense (teacher)"), (STUDENT, self.student))
        ]
        missing = [f"{METRICS[name].title} is missing: {reason}" for name, reason in self.missing.items()]
        return "\n".join([format_table(header, rows), *([""] if missing else []), *missing])

    def _names(self) -> list[str]:
        return [name for name in METRICS if name in self.means or name in self.missing]

    def _cell(self, name: str, row: str) -> str:
        if name in self.missing:
            return "missing"
        number = self.means[name].get(row)
        return "-" if number is None else f"{number:.{2 if abs(number) >= 10 else 3}f}"


def evaluation_sheet(evaluation: Evaluation, files: Mapping[str, Sequence[Path]]) -> Image.Image:
    """Return the first few images, the teacher's above the student's."""
    labels = {TEACHER: "dense\n(teacher)", STUDENT: evaluation.student.replace(", ", "\n")}
    rows = {label: [Image.open(file) for file in files[row][:IMAGES_ON_SHEET]] for row, label in labels.items()}
    return contact_sheet(rows, [image["prompt"] for image in evaluation.images[:IMAGES_ON_SHEET]])
