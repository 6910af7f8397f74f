"""Checkpoints of a run: write them atomically, delete the oldest, and read them without pickle."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from clear_attn.utils.atomic import UNFINISHED, atomic_directory, unfinished_directory
from clear_attn.utils.json_records import read_json
from clear_attn.utils.tensor_files import read_tensors, write_tensors
from clear_attn.weights.metadata import CONFIG_FILE, WEIGHTS_FILE

PREFIX = "checkpoint-"
SETTINGS = "settings.json"
LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Reserve a training folder for one run, and delete unfinished files of a killed run.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        FileExistsError: another run uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, blocking=False):
            for left in list(folder.rglob(f"{UNFINISHED}*")):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            yield
    except Timeout:
        raise FileExistsError(f"another run is using {folder}; wait for it, or give another output_dir") from None


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Convert a nested value for JSON: move its tensors into a dict, and replace them by their names."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # A list of pairs, because JSON would turn integer keys, as in an optimizer's state, into text.
        return {"items": [[key, pack(each, tensors, f"{name}.{key}")] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        return [pack(each, tensors, f"{name}.{number}") for number, each in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `pack`."""
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: unpack(each, tensors) for key, each in value["items"]}
    return [unpack(each, tensors) for each in value] if isinstance(value, list) else value


@contextlib.contextmanager
def writing(folder: Path, step: int, limit: int | None) -> Iterator[Path]:
    """Yield a directory that becomes a step's checkpoint on exit; then delete all but the last `limit` checkpoints.

    An error deletes the directory and keeps the earlier checkpoints.
    """
    with atomic_directory(folder / f"{PREFIX}{step}") as written:
        yield written
    for old in all_of(folder)[: -limit if limit else 0]:
        # Rename it first, so that an interrupt leaves no incomplete checkpoint under this name.
        shutil.rmtree(old.replace(unfinished_directory(old)))


def unfinished(folder: Path, step: int) -> Path:
    """Return the directory in which a step's checkpoint is written until it is complete."""
    return unfinished_directory(folder / f"{PREFIX}{step}")


def write(checkpoint: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write one part of a checkpoint: a file with its tensors, and a JSON file with the other values."""
    tensors: dict[str, Tensor] = {}
    packed = pack(state, tensors)
    write_tensors(tensors, checkpoint / f"{name}.safetensors")
    (checkpoint / f"{name}.json").write_text(json.dumps(packed), encoding="utf-8")


def read(checkpoint: Path, name: str) -> dict[str, Any]:
    """Return one part of a checkpoint.

    Raises:
        ValueError: the checkpoint is not complete.
    """
    with _reading(checkpoint):
        packed = read_json(checkpoint / f"{name}.json")
        tensors, _ = read_tensors(checkpoint / f"{name}.safetensors")
        state: dict[str, Any] = unpack(packed, tensors)
    return state


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Convert read errors to a ValueError that names the previous checkpoint as the remedy."""
    try:
        yield
    except (ValueError, FileNotFoundError, KeyError, TypeError) as error:
        present = all_of(checkpoint.parent)
        before = present[: present.index(checkpoint)][-1:] if checkpoint in present else []
        remedy = f"to continue from {before[0].name}" if before else "and start again"
        raise ValueError(f"{checkpoint} is not a complete checkpoint ({error}); delete it {remedy}") from error


def all_of(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find(folder: Path, wanted: str | None) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        FileExistsError: the folder has another run's result or checkpoints, or checkpoints later than the wanted one.
    """
    present = all_of(folder)
    if wanted == "latest" and present:
        return present[-1]
    if wanted not in (None, "latest"):
        found = Path(str(wanted)) if Path(str(wanted)).is_dir() else folder / str(wanted)
        if not found.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {wanted!r}, neither here nor in {folder}")
        # A later checkpoint would count as the latest, and new checkpoints as the oldest.
        if present and present[-1].resolve() != found.resolve():
            raise FileExistsError(
                f"{folder} has {present[-1].name} as well as the {found} to continue from; delete the checkpoints "
                "after it, or give another output_dir"
            )
        return found
    existing = [*present[-1:], *(folder / name for name in (CONFIG_FILE, WEIGHTS_FILE) if (folder / name).exists())]
    if existing:
        remedy = "continue it with resume_from_checkpoint='latest', or " if present else ""
        raise FileExistsError(f"{folder} has a run already, with {existing[0].name}; {remedy}give another output_dir")
    return None


def write_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that must be the same when this run is resumed."""
    (checkpoint / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def check_settings(checkpoint: Path, ours: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint was made with other settings than the run that resumes it."""
    with _reading(checkpoint):
        theirs = dict(read_json(checkpoint / SETTINGS))
    other = [name for name, value in ours.items() if theirs.get(name) != value]
    if other:
        raise ValueError(
            f"the checkpoint was made with {', '.join(f'{name}={theirs.get(name)!r}' for name in other)}, not "
            f"{', '.join(f'{name}={ours[name]!r}' for name in other)}; continue it with the same settings"
        )
