"""Files that are whole or not there, and folders that hold one thing alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


def put(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file whole or not at all."""
    unfinished = file.with_name(f".unfinished-{os.getpid()}-{file.name}")
    try:
        write(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def same_origin(theirs: Mapping[str, Any], ours: NamedTuple, what: str) -> None:
    """Raises ValueError where a folder's content is of something else; `what` begins the message."""
    for name, value in ours._asdict().items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{what} for {name} {theirs.get(name)!r}, not {value!r}; give another folder, or delete this one"
            )
