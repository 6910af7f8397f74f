"""Read and write safetensors files."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` file on the CPU, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a complete safetensors file.
    """
    try:
        with deferred_interrupt(), safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}); fetch or save it again") from error


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` file.

    Raises:
        OSError: it cannot be written, for example on a full disk.
    """
    try:
        save_file(dict(tensors), file, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{file} could not be written ({error})") from error


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Deliver Ctrl-C after the block.

    safetensors calls Python from Rust, where a KeyboardInterrupt becomes another error or is lost.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # no KeyboardInterrupt is raised in other threads, or without a Python handler
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])
