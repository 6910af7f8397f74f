"""Run the tests in `kernels`, in processes where Triton interprets the kernels on the CPU."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

FILES = sorted((pathlib.Path(__file__).parent / "kernels").glob("test_*.py"))
QUICK = ("test_kernels", "test_operator")


def run(file, marks):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marks, str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=() if file.stem in QUICK else pytest.mark.slow, id=file.stem) for file in FILES],
)
def test_in_a_process_of_its_own(file):
    run(file, "not slow")


@pytest.mark.slow
def test_the_slow_ones_in_a_process_of_their_own():
    run(FILES[0].parent, "slow")
