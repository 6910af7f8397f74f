"""Safetensors files: Ctrl-C is not turned into another error, and truncated files are named."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from clear_attn.utils import tensor_files
from clear_attn.utils.tensor_files import read_tensors


@pytest.fixture
def file(tmp_path):
    save_file({"a": torch.randn(3), "b": torch.randn(2, 2)}, tmp_path / "x.safetensors", metadata={"of": "two"})
    return tmp_path / "x.safetensors"


def test_reads_tensors_and_metadata(file):
    tensors, metadata = read_tensors(file)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"a": (3,), "b": (2, 2)}
    assert metadata == {"of": "two"}


class SwallowsInterrupts:
    """A file that is interrupted while safetensors reads it, which turns the interrupt into another error."""

    def __init__(self, error):
        self.error = error

    def __call__(self, file, framework):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def keys(self):
        return ["a"]

    def get_tensor(self, name):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # Python runs its signal handlers here
                pass
        except KeyboardInterrupt:
            pass
        raise self.error


@pytest.mark.parametrize("error", [ValueError("bare"), safetensors.SafetensorError("half")])
def test_ctrl_c_is_raised_whatever_safetensors_raises(file, monkeypatch, error):
    monkeypatch.setattr(tensor_files, "safe_open", SwallowsInterrupts(error))
    # A shell starts its background jobs with SIGINT ignored, and Python keeps it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            read_tensors(file)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_users_handler_is_called(file, monkeypatch):
    calls = []
    before = signal.signal(signal.SIGINT, lambda number, _: calls.append(number))
    try:
        monkeypatch.setattr(tensor_files, "safe_open", SwallowsInterrupts(ValueError("bare")))
        with pytest.raises(ValueError, match="bare"):
            read_tensors(file)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [signal.SIGINT]


def test_other_threads_read_without_signal_handlers(file):
    with ThreadPoolExecutor() as threads:
        tensors, _ = threads.submit(read_tensors, file).result()
    assert tensors.keys() == {"a", "b"}


def test_a_truncated_file_is_named(file):
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a complete safetensors file"):
        read_tensors(file)


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written \(No space left on device\)"):
        tensor_files.write_tensors({}, tmp_path / "a.safetensors")
