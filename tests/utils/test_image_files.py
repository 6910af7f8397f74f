"""Checks of image files before drawing, and fallback files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clear_attn.utils import image_files
from clear_attn.utils.image_files import MAX_SIDES, save_or_fall_back, try_write, validate_image_file


@pytest.mark.parametrize("ending", MAX_SIDES)
def test_every_format_keeps_all_pixels(ending, tmp_path):
    file = tmp_path / f"image{ending}"
    validate_image_file(file, (300, 700))
    Image.effect_noise((700, 300), 50).convert("RGB").save(file)
    with Image.open(file) as image:
        assert (image.size, image.mode) == ((700, 300), "RGB")


@pytest.mark.parametrize("ending", [".ico", ".xbm", ".wmf", ".h5", ".gif", ".eps", ""])
def test_refuses_formats_that_lose_pixels_or_cannot_be_written(ending):
    with pytest.raises(ValueError, match=r"does not end in \.png, .* let it end in \.png"):
        validate_image_file(Path(f"image{ending}"))


@pytest.mark.parametrize(("ending", "most"), [(".jpg", 65535), (".webp", 16383)])
def test_refuses_sides_that_a_format_does_not_hold(ending, most):
    validate_image_file(Path(f"image{ending}"), (1, most))
    with pytest.raises(ValueError, match=f"hold images of at most {most} px a side, and this one is {most + 1} x 1 px"):
        validate_image_file(Path(f"image{ending}"), (most + 1, 1))


def test_trial_files_are_deleted(tmp_path):
    for name in ("image.png", "image.webp", "image.png.json"):
        try_write(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_refuses_names_and_folders_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"cannot be written .*give another file"):
        try_write(tmp_path / f"{'x' * 300}.png")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="is a directory"):
        try_write(folder)
    with pytest.raises(FileNotFoundError, match="cannot be written"):
        try_write(tmp_path / "none" / "image.png")
    with pytest.raises(FileNotFoundError) as caught:
        try_write(tmp_path / "none" / "image.png")
    assert ".unfinished-" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["folder.png"]


def test_refuses_a_full_disk(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"image\.png cannot be written \(.*No space left on device"):
        try_write(tmp_path / "image.png")


def test_files_of_a_killed_trial_are_deleted_later(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from clear_attn.utils import image_files
image_files.atomic_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)
image_files.try_write(Path(sys.argv[1]))
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out.png")], check=False)
    assert [left.name.startswith(".unfinished-") for left in tmp_path.iterdir()] == [True]
    try_write(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_an_image_that_cannot_be_written_goes_to_a_fallback_file(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files.tempfile, "tempdir", str(tmp_path))
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    file = tmp_path / "none" / "image.png"
    with pytest.warns(UserWarning, match=r"image\.png could not be written .*; the image is in .*image\.png"):
        written = save_or_fall_back(image.save, file)
    assert written != file
    assert Image.open(written).getpixel((0, 0)) == (1, 2, 3)
    assert save_or_fall_back(image.save, tmp_path / "image.png") == tmp_path / "image.png"


def test_the_first_error_is_raised_if_the_fallback_fails_too(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files.tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="first"):
        save_or_fall_back(lambda file: (_ for _ in ()).throw(ValueError("first")), tmp_path / "image.png")
