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

PREFIX = "checkpoint-"
SETTINGS = "settings.json"
UNFINISHED = ".unfinished-checkpoint-"


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
    """A folder to write a step's checkpoint into, which takes its place beside the earlier ones when all is written.

    Then all but the last `limit` are deleted. An error deletes what was written, and the earlier ones stay.
    """
    for left in folder.glob(f"{UNFINISHED}*"):  # by a run that was killed
        shutil.rmtree(left)
    target = folder / f"{PREFIX}{step}"
    unfinished(folder, step).mkdir()
    try:
        yield unfinished(folder, step)
    except BaseException:
        shutil.rmtree(unfinished(folder, step))
        raise
    if target.exists():
        shutil.rmtree(target)
    unfinished(folder, step).replace(target)
    for old in all_of(folder)[: -limit if limit else 0]:
        shutil.rmtree(old)


def unfinished(folder: Path, step: int) -> Path:
    """Where a step's checkpoint is written."""
    return folder / f"{UNFINISHED}{step}"


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
        FileExistsError: the folder holds another run, and nothing was said of continuing it.
    """
    present = all_of(folder)
    if wanted is None:
        if present:
            raise FileExistsError(
                f"{folder} holds a run with {present[-1].name}; continue it with resume_from_checkpoint='latest', or "
                "give another output_dir"
            )
        return None
    if wanted == "latest":
        return present[-1] if present else None
    return Path(wanted) if Path(wanted).is_dir() else folder / wanted


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
