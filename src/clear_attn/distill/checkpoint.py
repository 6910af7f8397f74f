"""A run's checkpoints: written whole or not at all, the oldest deleted, and read back without pickles."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "checkpoint-"
STATE, TENSORS = "state.json", "state.safetensors"


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


def save(folder: Path, step: int, state: Mapping[str, Any], limit: int | None) -> Path:
    """Writes a checkpoint of a step beside the earlier ones, then deletes all but the last `limit`."""
    tensors: dict[str, Tensor] = {}
    packed = pack(state, tensors)
    target = folder / f"{PREFIX}{step}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        whole = Path(unfinished, "whole")
        whole.mkdir()
        save_file(tensors, whole / TENSORS)
        (whole / STATE).write_text(json.dumps(packed), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        whole.replace(target)
    for old in all_of(folder)[: -limit if limit else 0]:
        shutil.rmtree(old)
    return target


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def load(checkpoint: Path) -> dict[str, Any]:
    """What was saved.

    Raises:
        FileNotFoundError: it is no checkpoint.
    """
    for name in (STATE, TENSORS):
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(f"{checkpoint} is no whole checkpoint: it has no {name}")
    packed = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    state: dict[str, Any] = unpack(packed, load_file(checkpoint / TENSORS))
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


def same_values(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises ValueError where a run is to be continued with other settings."""
    other = [name for name, value in ours.items() if theirs.get(name) != value]
    if other:
        raise ValueError(
            f"the checkpoint was made with {', '.join(f'{name}={theirs.get(name)!r}' for name in other)}, not "
            f"{', '.join(f'{name}={ours[name]!r}' for name in other)}; continue it with the same settings"
        )
