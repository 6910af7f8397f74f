"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import torch
import typer
from PIL import Image

# Unless asked for another.
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


class DType(StrEnum):
    """Of query, key and value, or of the model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def device_of(name: str | None) -> torch.device:
    """The device of a name; without one, a GPU where there is one.

    Raises:
        BadParameter: it is not here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DTYPES or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise typer.BadParameter(f"{name!r} is not here; there is {', '.join(there)}", param_hint="--device")
    return device


def check_picture_file(file: Path, option: str) -> None:
    """Raises BadParameter where no picture can be saved as this file."""
    if not file.resolve().parent.is_dir():
        raise typer.BadParameter(f"no such directory: {file.resolve().parent}", param_hint=option)
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise typer.BadParameter(f"{file} names no kind of picture; let it end in .png", param_hint=option)
