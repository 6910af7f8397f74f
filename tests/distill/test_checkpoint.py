"""The lock of a training folder, and checkpoints that are not complete."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clear_attn.distill import checkpoint

FORMAT_1 = Path(__file__).parents[1] / "data" / "format_1" / "checkpoint-1"


def test_a_folder_has_one_run(tmp_path):
    with (
        checkpoint.locked(tmp_path),
        pytest.raises(FileExistsError, match="another run is using"),
        checkpoint.locked(tmp_path),
    ):
        pass
    with checkpoint.locked(tmp_path):
        pass


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from clear_attn.distill import checkpoint
with checkpoint.locked(Path({str(tmp_path)!r})):
    Path({str(tmp_path)!r}, ".unfinished-checkpoint-4").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert (tmp_path / ".unfinished-checkpoint-4").is_dir()
    with checkpoint.locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LOCK]


@pytest.mark.parametrize("name", ["run.safetensors", "run.json"])
def test_a_truncated_checkpoint(tmp_path, name):
    for number in (1, 2):
        shutil.copytree(FORMAT_1, tmp_path / f"checkpoint-{number}")
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"checkpoint-2 is not a complete .*{name}.*delete it to continue from check"):
        checkpoint.read(tmp_path / "checkpoint-2", "run")
