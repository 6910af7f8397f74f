"""Files and directories that are written completely or not at all."""

import contextlib
import re
import stat
import subprocess
import sys

import pytest

from clear_attn.utils.atomic import (
    UNFINISHED,
    atomic_directory,
    atomic_file,
    check_empty,
    check_folder,
    delete_leftovers,
)

ERRORS = [OSError(28, "No space left on device"), KeyboardInterrupt()]


def content_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def fail_halfway(file, error):
    file.write_text("half")
    raise error


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def error(request):
    return request.param


class TestFile:
    def test_the_target_is_replaced_at_the_end(self, tmp_path):
        (tmp_path / "a.txt").write_text("old")
        with atomic_file(tmp_path / "a.txt") as unfinished:
            unfinished.write_text("new")
            assert (tmp_path / "a.txt").read_text() == "old"
            assert (unfinished.parent, unfinished.suffix) == (tmp_path, ".txt")
        assert content_of(tmp_path) == {"a.txt": "new"}

    @pytest.mark.parametrize("before", [{}, {"a.txt": "old"}])
    def test_error(self, tmp_path, error, before):
        for name, text in before.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(type(error)), atomic_file(tmp_path / "a.txt") as unfinished:
            fail_halfway(unfinished, error)
        assert content_of(tmp_path) == before

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
    def test_errors_name_the_file(self, tmp_path, error):
        path = tmp_path / "a.txt" if error else tmp_path / "none" / "a.txt"
        with pytest.raises(OSError, match=re.escape(f"'{path}'")) as caught, atomic_file(path) as unfinished:
            fail_halfway(unfinished, error)
        assert UNFINISHED not in str(caught.value)

    def test_an_error_without_a_number_keeps_its_message(self, tmp_path):
        with pytest.raises(OSError, match="cannot write mode RGBA as JPEG"), atomic_file(tmp_path / "a.txt") as file:
            fail_halfway(file, OSError("cannot write mode RGBA as JPEG"))

    def test_permissions_are_those_of_any_file(self, tmp_path):
        """Also if the writer makes a private file, as safetensors does."""
        (tmp_path / "normal").touch()
        with atomic_file(tmp_path / "a.txt") as unfinished:
            unfinished.write_text("new")
            unfinished.chmod(0o600)
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("normal", "a.txt")]
        assert modes[0] == modes[1] != 0o600

    def test_two_writers_of_one_file(self, tmp_path):
        with atomic_file(tmp_path / "a.txt") as first, atomic_file(tmp_path / "a.txt") as second:
            assert first != second
            first.write_text("first")
            second.write_text("second")
        assert content_of(tmp_path) == {"a.txt": "first"}

    def test_several_files_are_replaced_in_reverse(self, tmp_path):
        """The first file is unchanged if a later one cannot be replaced."""
        (tmp_path / "record").write_text("old")
        (tmp_path / "weights").mkdir()
        files = contextlib.ExitStack()
        for name in ("record", "weights"):
            files.enter_context(atomic_file(tmp_path / name)).write_text("new")
        with pytest.raises(IsADirectoryError):
            files.close()
        assert content_of(tmp_path) == {"record": "old"}


class TestDirectory:
    def test_appears_at_the_end(self, tmp_path):
        with atomic_directory(tmp_path / "run") as unfinished:
            (unfinished / "a.txt").write_text("new")
            assert not (tmp_path / "run").exists()
        assert content_of(tmp_path) == {"run/a.txt": "new"}

    def test_error(self, tmp_path, error):
        with pytest.raises(type(error)), atomic_directory(tmp_path / "run") as unfinished:
            fail_halfway(unfinished / "a.txt", error)
        assert list(tmp_path.iterdir()) == []

    def test_existing_content_is_kept(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "a.txt").write_text("old")
        with pytest.raises(OSError, match="not empty"), atomic_directory(tmp_path / "run") as unfinished:
            (unfinished / "a.txt").write_text("new")
        assert content_of(tmp_path) == {"run/a.txt": "old"}
        assert len(list(tmp_path.iterdir())) == 1


def test_refuses_a_folder_with_content(tmp_path):
    check_empty(tmp_path)
    check_empty(tmp_path / "new")
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something already"):
        check_empty(tmp_path)
    for check in (check_folder, check_empty):
        with pytest.raises(NotADirectoryError, match="is a file; give a directory"):
            check(tmp_path / "a.txt")
    assert content_of(tmp_path) == {"a.txt": "mine"}


KILLED = """
import os, signal, sys
from pathlib import Path
from clear_attn.utils import atomic
with atomic.atomic_file(Path(sys.argv[1])) as unfinished:
    unfinished.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_a_killed_process_are_deleted_by_the_next(tmp_path):
    path = tmp_path / "a.txt"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert [left.name.startswith(UNFINISHED) for left in tmp_path.iterdir()] == [True]
    with atomic_file(path) as unfinished:
        unfinished.write_text("new")
    assert content_of(tmp_path) == {"a.txt": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_files_of_a_running_process_are_kept(tmp_path):
    with atomic_file(tmp_path / "a.txt") as first:
        first.write_text("first")
        with atomic_file(tmp_path / "b.txt") as second:
            second.write_text("second")
        delete_leftovers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", "b.txt"}
