"""Atomic writes: a file or directory gets its name when it is complete, or is deleted."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

UNFINISHED = ".unfinished-"
OWNED = re.compile(re.escape(UNFINISHED) + r"(?P<host>[\w-]+)\.(?P<pid>\d+)\.[0-9a-f]{8}-")


def delete_leftovers(folder: Path) -> None:
    """Delete unfinished files and folders of killed processes on this machine, but not of running ones."""
    for left in folder.glob(f"{UNFINISHED}*"):
        owner = OWNED.match(left.name)
        if owner and owner["host"] == _host() and not psutil.pid_exists(int(owner["pid"])):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def owned_prefix() -> str:
    """Return a new prefix for an unfinished file or folder; `delete_leftovers` reads the process from it."""
    return f"{UNFINISHED}{_host()}.{os.getpid()}.{secrets.token_hex(4)}-"


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())[:20]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to ``path`` that replaces it at the end; delete it after an error.

    The temporary name ends in the name of ``path``, for writers that choose a format by it. Several files in one
    `contextlib.ExitStack` are renamed when all are written, the last one first.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    delete_leftovers(path.parent)
    # The name is unique, because two processes may write the same file.
    unfinished = path.with_name(f"{owned_prefix()}{path.name}")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        # safetensors makes its files readable only by their owner.
        unfinished.chmod(mode)
        unfinished.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(unfinished)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def os_reason(error: Exception) -> str:
    """Return why a file could not be written, without the name of a temporary file.

    Examples:
        >>> os_reason(OSError(28, "No space left on device", "a.txt"))
        'No space left on device'
    """
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def warn_if_unwritten(path: Path) -> Iterator[None]:
    """Turn an error of writing a file in the block into a warning, where what goes on is worth more than the file."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{path} could not be written ({os_reason(error)})", stacklevel=3)


def atomic_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_text(Path(folder, "a.txt"), "one")
        ...     Path(folder, "a.txt").read_text()
        'one'
    """
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def unfinished_directory(path: Path) -> Path:
    """Return the directory in which `atomic_directory` writes, for other processes that write into it."""
    return path.with_name(UNFINISHED + path.name)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory next to ``path`` that is renamed to it at the end; delete it after an error."""
    unfinished = unfinished_directory(path)
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_folder(directory: str | os.PathLike[str]) -> Path:
    """Return a folder to write to.

    Raises:
        NotADirectoryError: it is a file.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(directory)!r} is a file; give a directory to save to")
    return folder


def check_empty(folder: Path, ignored: Collection[str] = ()) -> None:
    """Check that a folder is new, or empty except for files of the ignored names.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: it is not empty.
    """
    check_folder(folder)
    if folder.is_dir() and any(path.name not in ignored for path in folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already; give a new or an empty folder")
