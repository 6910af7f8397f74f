"""An unfinished evaluation: a folder in its output, with the images that are drawn, from which it can be resumed.

It can be resumed while it has its file of settings, which is written first, and deleted when the result is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clear_attn.utils.atomic import atomic_text, check_empty, check_folder, delete_leftovers
from clear_attn.utils.json_records import read_json

SETTINGS = "settings.json"
LOCK = ".eval.lock"


def unfinished_folder(output: Path) -> Path:
    """Return the folder of an unfinished evaluation."""
    return output / "unfinished"


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Reserve a folder for one evaluation, and delete it at the end if it is new and still empty.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: another process evaluates to it.
    """
    check_folder(output)
    new = [folder for folder in (output, *output.parents) if not folder.exists()]
    lock = FileLock(output / LOCK, blocking=False)
    try:
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise FileExistsError(
                f"{output} is being evaluated by another process; wait for it, or give another output_dir"
            ) from None
        try:
            yield
        finally:
            # Before the release, so that it is never another process's file; Windows deletes it on release.
            with contextlib.suppress(OSError):
                (output / LOCK).unlink()
            lock.release()
    finally:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()


def check_output(output: Path, *, resume: bool) -> None:
    """Check that a folder can be evaluated to.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: it is not empty.
        FileNotFoundError: it has no unfinished evaluation to resume.
    """
    folder = unfinished_folder(output)
    if resume:
        if not (folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{output} has no unfinished evaluation; leave resume=True out to begin one")
        return
    if (folder / SETTINGS).is_file():
        raise FileExistsError(
            f"{output} holds an unfinished evaluation; go on with resume=True, or give another output_dir"
        )
    delete_leftovers(output)
    # A run that was killed at its start leaves a folder without files.
    delete_leftovers(folder)
    if folder.is_dir() and all(path.is_dir() for path in folder.rglob("*")):
        shutil.rmtree(folder)
    check_empty(output, ignored=(LOCK,))


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the images of an unfinished evaluation were drawn with other settings."""
    before, now = read_json(unfinished_folder(output) / SETTINGS), json.loads(_to_json(settings))
    differ = [f"{name} must be {_same(before.get(name), now[name])}" for name in now if now[name] != before.get(name)]
    if differ:
        raise ValueError(
            f"{output} holds an unfinished evaluation of other images: to go on with it, {', '.join(differ)}; "
            "or give another output_dir"
        )


def _same(before: Any, now: Any) -> str:
    """Return in words that a value must be as before, with both if they are short."""
    values = f" (was {before!r}, is {now!r})"
    return f"the same{values if len(values) < 200 else ''}"


def _to_json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, ensure_ascii=False, default=str)


@contextlib.contextmanager
def unfinished_run(output: Path, settings: dict[str, Any], rows: Iterable[str], images: int) -> Iterator[Path]:
    """Yield the folder to draw in, new or of the run to resume; `finish` deletes it.

    Rows that a killed run had moved to the result already are moved back.

    After an error it is kept, with a warning that says so, unless it has no image yet.

    Args:
        output: the folder of the result.
        settings: what the images depend on, as JSON.
        rows: the names of the folders of images.
        images: the number of images to draw.
    """
    folder = unfinished_folder(output)
    for row in rows:
        if (output / row).is_dir():
            (output / row).replace(folder / row)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_text(folder / SETTINGS, _to_json(settings))
        yield folder
    except BaseException:
        if kept := len(list(folder.glob("*/[0-9]*.png"))):
            warn_of_kept(folder, kept, images, stacklevel=5)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def warn_of_kept(folder: Path, kept: int, images: int, stacklevel: int) -> None:
    """Warn that images are kept, and say how to go on from them."""
    warnings.warn(
        f"{kept} of {images} images are kept in {folder}; the same arguments with resume=True go on from them",
        stacklevel=stacklevel,
    )


def finish(output: Path, rows: Iterable[str]) -> None:
    """Move the images of some rows to the result, and delete the rest of a finished evaluation."""
    folder = unfinished_folder(output)
    for row in rows:
        (folder / row).replace(output / row)
    (folder / SETTINGS).unlink()
    shutil.rmtree(folder)
