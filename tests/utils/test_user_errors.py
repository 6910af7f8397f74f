"""Errors that a user can mend, told from bugs."""

from pathlib import Path

import pytest
import torch

import clear_attn as clear
from clear_attn.core.coordinates import invert_permutation
from clear_attn.utils.user_errors import is_out_of_memory, is_user_error


def raised_by(call):
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(
    "call",
    [
        lambda: clear.methods.Clear(0),
        lambda: clear.methods.Clear("8"),
        lambda: clear.linearize(3),
        lambda: Path("no/such/file").read_text(),
        lambda: __import__("no_such_library"),
    ],
)
def test_errors_of_users(call):
    assert is_user_error(raised_by(call))


@pytest.mark.parametrize(
    "call",
    [
        lambda: invert_permutation(None),  # in the library, by no `raise` statement
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: int("x"),
        lambda: 1 / 0,
    ],
)
def test_bugs(call):
    assert not is_user_error(raised_by(call))


def test_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert is_user_error(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))
