"""A folder that is filled whole or not at all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clear_attn.patching.saving import check_folder


def check_new(folder: Path) -> None:
    """Raises NotADirectoryError where a folder is a file, FileExistsError where it holds something."""
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already; give a new or an empty folder")


@contextlib.contextmanager
def filled_at_the_end(folder: Path) -> Iterator[Path]:
    """Where to write what is to be in ``folder`` when the block has ended; after an error nothing is.

    Raises:
        NotADirectoryError, FileExistsError: as `check_new`.
        PermissionError: nothing can be written there.
    """
    check_new(folder)
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
            yield Path(unfinished)
            for item in Path(unfinished).iterdir():
                item.replace(folder / item.name)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
