"""Run the tests in `kernels`, in processes where Triton interprets the kernels on the CPU."""

import os
import pathlib
import subprocess
import sys

import pytest

from clear_attn.backends.triton.support import unsupported_triton

FILES = sorted((pathlib.Path(__file__).parent / "kernels").glob("test_*.py"))
QUICK = ("test_kernels",)
obstacle = unsupported_triton()
needs_triton = pytest.mark.skipif(obstacle is not None, reason=f"the kernels cannot run: {obstacle}")


def run(file, marks):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marks, str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=() if file.stem in QUICK else pytest.mark.slow, id=file.stem) for file in FILES],
)
def test_in_a_process_of_its_own(file):
    run(file, "not slow")


@needs_triton
@pytest.mark.slow
def test_the_slow_ones_in_a_process_of_their_own():
    run(FILES[0].parent, "slow")
