"""Check image files before drawing, and save to a fallback file if the final write fails."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from clear_attn.utils.atomic import atomic_file, delete_leftovers, os_reason, owned_prefix

# Formats that keep every pixel of an RGB image, if not its exact values, and their longest sides, by ending.
MAX_SIDES = {
    ".png": 2**31 - 1,
    ".jpg": 65535,
    ".jpeg": 65535,
    ".webp": 16383,
    ".tif": 2**31 - 1,
    ".tiff": 2**31 - 1,
    ".bmp": 2**31 - 1,
}


def validate_image_file(file: Path, size: tuple[int, int] | None = None) -> None:
    """Check the name of an image file, and that its format holds an image of this size.

    Args:
        file: the file of the image.
        size: height and width in pixels, if known.

    Raises:
        ValueError: the format is unknown or cannot hold the image.
    """
    most = MAX_SIDES.get(file.suffix.lower())
    if most is None:
        raise ValueError(f"{file} does not end in {', '.join(MAX_SIDES)}; let it end in .png")
    if size and max(size) > most:
        raise ValueError(
            f"{file}: {file.suffix} files hold images of at most {most} px a side, and this one is {size[0]} x "
            f"{size[1]} px; let it end in .png"
        )


def try_write(file: Path) -> None:
    """Write a small file next to the given one as `atomic_file` would, and delete it.

    Raises:
        OSError: the file cannot be written, or is a directory.
    """
    try:
        delete_leftovers(file.parent)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=owned_prefix()) as folder:
            trial = Path(folder) / file.name
            with atomic_file(trial) as unfinished:
                if file.suffix.lower() in MAX_SIDES:
                    Image.new("RGB", (8, 8)).save(unfinished)
                else:
                    unfinished.write_bytes(bytes(4096))
    except OSError as error:
        raise type(error)(f"{file} cannot be written ({os_reason(error)}); give another file") from None
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a directory; give the name of a file in it")


def save_or_fall_back(save: Callable[[Path], None], file: Path) -> Path:
    """Save an image; if that fails, save it as PNG in the system's temporary folder, with a warning that names it.

    Args:
        save: a function that writes the image to a file.
        file: the wanted file.

    Returns:
        The file that was written.

    Raises:
        OSError, ValueError: from `save`, if the fallback file cannot be written either.
    """
    try:
        save(file)
        return file
    except (OSError, ValueError) as error:
        try:
            fallback = Path(tempfile.mkdtemp(prefix="clear_attn-")) / "image.png"
            save(fallback)
        except (OSError, ValueError):
            raise error from None
        warnings.warn(f"{file} could not be written ({os_reason(error)}); the image is in {fallback}", stacklevel=3)
        return fallback
