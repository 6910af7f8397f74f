"""Run the tests in `interpreted`, in processes where Triton interprets the kernels on the CPU."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "interpreted"
MARKS = {"test_compiled": [pytest.mark.slow]}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "name", [pytest.param(path.stem, marks=MARKS.get(path.stem, [])) for path in sorted(FOLDER.glob("test_*.py"))]
)
def test_in_a_process_of_its_own(name):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", str(FOLDER / f"{name}.py")]
    if "slow" not in os.environ.get("CLEAR_ATTN_TEST_MARKS", ""):
        command[command.index("")] = "not slow"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
