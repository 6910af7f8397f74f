"""A run's checkpoints: written whole or not at all, the oldest deleted, and read back without pickles."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from clear_attn.utils.atomic import atomic_directory, unfinished_directory
from clear_attn.weights.metadata import CONFIG_FILE
from clear_attn.weights.sources import WEIGHTS_FILE

PREFIX = "checkpoint-"
SETTINGS = "settings.json"


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A nested value for JSON, its tensors put aside under the names that stand in their place."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # Keys that are numbers, as in an optimizer's state, would come back as text.
        return {"items": [[key, pack(each, tensors, f"{name}.{key}")] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        return [pack(each, tensors, f"{name}.{number}") for number, each in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `pack`."""
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: unpack(each, tensors) for key, each in value["items"]}
    return [unpack(each, tensors) for each in value] if isinstance(value, list) else value


@contextlib.contextmanager
def writing(folder: Path, step: int, limit: int | None) -> Iterator[Path]:
    """Yield a directory that becomes a step's checkpoint when all is written; then delete all but the last `limit`.

    An error deletes what was written, and the earlier checkpoints stay.
    """
    for left in folder.glob(unfinished(folder, "*").name):  # by a run that was killed
        shutil.rmtree(left)
    with atomic_directory(folder / f"{PREFIX}{step}") as written:
        yield written
    for old in all_of(folder)[: -limit if limit else 0]:
        # Under another name first: half a checkpoint must not be taken for one.
        shutil.rmtree(old.replace(unfinished_directory(old)))


def unfinished(folder: Path, step: int | str) -> Path:
    """Return where a step's checkpoint is written."""
    return unfinished_directory(folder / f"{PREFIX}{step}")


def write(checkpoint: Path, name: str, state: Mapping[str, Any]) -> None:
    """Writes one part of a checkpoint: its tensors, then all else."""
    tensors: dict[str, Tensor] = {}
    packed = pack(state, tensors)
    save_file(tensors, checkpoint / f"{name}.safetensors")
    (checkpoint / f"{name}.json").write_text(json.dumps(packed), encoding="utf-8")


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def read(checkpoint: Path, name: str) -> dict[str, Any]:
    """One part of a checkpoint.

    Raises:
        FileNotFoundError: it is no checkpoint, or has no such part.
    """
    files = checkpoint / f"{name}.json", checkpoint / f"{name}.safetensors"
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{checkpoint} is no whole checkpoint: it has no {file.name}")
    packed, tensors = files
    state: dict[str, Any] = unpack(json.loads(packed.read_text(encoding="utf-8")), load_file(tensors))
    return state


def find(folder: Path, wanted: str | None) -> Path | None:
    """The checkpoint that a run is to continue, or None where it is to begin.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: the folder holds another run's result or checkpoints, or later ones than that.
    """
    present = all_of(folder)
    if wanted == "latest" and present:
        return present[-1]
    if wanted not in (None, "latest"):
        found = Path(str(wanted)) if Path(str(wanted)).is_dir() else folder / str(wanted)
        if not found.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {wanted!r}, neither here nor in {folder}")
        # What comes after it would be taken for the latest one, and the new ones for old.
        if present and present[-1].resolve() != found.resolve():
            raise FileExistsError(
                f"{folder} holds {present[-1].name} beside the {found} to continue; delete what is not to be gone on "
                "with, or give another output_dir"
            )
        return found
    there = [*present[-1:], *(folder / name for name in (CONFIG_FILE, WEIGHTS_FILE) if (folder / name).exists())]
    if there:
        remedy = "continue it with resume_from_checkpoint='latest', or " if present else ""
        raise FileExistsError(f"{folder} holds a run already, with {there[0].name}; {remedy}give another output_dir")
    return None


def write_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Writes what a run that continues this one has to share with it."""
    (checkpoint / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def check_settings(checkpoint: Path, ours: Mapping[str, Any]) -> None:
    """Compares the settings of a checkpoint with those of the run that is to continue it.

    Raises:
        FileNotFoundError: it is no checkpoint.
        ValueError: it was made with others.
    """
    file = checkpoint / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"{checkpoint} is no whole checkpoint: it has no {file.name}")
    theirs = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in ours.items() if theirs.get(name) != value]
    if other:
        raise ValueError(
            f"the checkpoint was made with {', '.join(f'{name}={theirs.get(name)!r}' for name in other)}, not "
            f"{', '.join(f'{name}={ours[name]!r}' for name in other)}; continue it with the same settings"
        )
