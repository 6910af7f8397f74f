"""What an evaluation found: numbers as a table, as JSON, and a sheet of pictures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from clear_attn.methods.records import method_from_dict
from clear_attn.tools.evaluate.metric_registry import METRICS
from clear_attn.tools.evaluate.metrics import STUDENT, TEACHER
from clear_attn.tools.evaluate.student_images import Drawn, read
from clear_attn.utils.image_sheets import contact_sheet

PICTURES_ON_SHEET = 6
ARROWS = {"higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Evaluation:
    """Numbers of two rows, `"teacher"` and `"student"`.

    Attributes:
        settings: what was drawn, and how.
        versions: of the libraries.
        seconds: by row, `"total"` for all pictures, `"per_picture"` in the median batch; the student's first batch may
            hold a compilation.
        means: by metric and row; a metric that compares with the teacher has the student's row alone.
        missing: by metric, why it was not computed.
        pictures: of each picture its `"prompt"` and `"seed"`, and by row its numbers by metric.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, dict[str, float]]
    means: dict[str, dict[str, float]]
    missing: dict[str, str]
    pictures: list[dict[str, Any]]

    @property
    def student(self) -> str:
        """The student in words."""
        method = method_from_dict(self.settings["method"])
        free = ", training-free" if self.settings["weights"] is None else ""
        return f"{method.title}, {method.as_arguments()}{free}"

    def to_json(self) -> str:
        """The text of an eval.json; what is no number to JSON stands there as text, `"inf"` or `"nan"`."""
        metrics = {
            name: {
                **{field: getattr(METRICS[name], field) for field in ("title", "better", "meaning")},
                **(self.means[name] if name in self.means else {"missing": self.missing[name]}),
            }
            for name in METRICS
            if name in self.means or name in self.missing
        }
        values = {
            "settings": self.settings,
            "versions": self.versions,
            "seconds": self.seconds,
            "metrics": metrics,
            "pictures": self.pictures,
        }
        return json.dumps(_finite(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def __str__(self) -> str:
        names = [name for name in METRICS if name in self.means or name in self.missing]
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{len(self.pictures)} pictures of {self.settings['width']} x {self.settings['height']} px")
        for name in names:
            table.add_column(f"{METRICS[name].title} {ARROWS[METRICS[name].better]}", justify="right")
        table.add_column("s / picture", justify="right")
        for row, label in ((TEACHER, "dense (teacher)"), (STUDENT, self.student)):
            cells = [self._cell(name, row) for name in names]
            table.add_row(label, *cells, f"{self.seconds[row]['per_picture']:.3g}")
        console = Console(width=200, color_system=None)
        with console.capture() as capture:
            console.print(table)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        missing = [f"{METRICS[name].title} is missing: {reason}" for name, reason in self.missing.items()]
        return "\n".join([*lines, *([""] if missing else []), *missing])

    def _cell(self, name: str, row: str) -> str:
        if name in self.missing:
            return "missing"
        number = self.means[name].get(row)
        return "-" if number is None else f"{number:.{2 if abs(number) >= 10 else 3}f}"


def sheet(evaluation: Evaluation, teacher: Drawn, student: Drawn) -> Image.Image:
    """The first few pictures, the teacher's above the student's."""
    label = evaluation.student.replace(", ", "\n")
    rows = {"dense\n(teacher)": teacher, label: student}
    captions = [str(picture["prompt"]) for picture in evaluation.pictures[:PICTURES_ON_SHEET]]
    return contact_sheet(
        {label: [read(file) for file in drawn.files[:PICTURES_ON_SHEET]] for label, drawn in rows.items()}, captions
    )


def seconds_of(drawn: Drawn, batch_size: int) -> dict[str, float]:
    """In all, and for one picture in the median batch."""
    sizes = [min(batch_size, len(drawn.files) - start) for start in range(0, len(drawn.files), batch_size)]
    each = [seconds / size for seconds, size in zip(drawn.seconds, sizes, strict=True)]
    return {"total": sum(drawn.seconds), "per_picture": median(each)}


def _finite(value: Any) -> Any:
    """The same with text in the place of numbers that are not finite."""
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if not math.isfinite(value):
            return str(value)
    return value
