"""Pictures with captions: from a folder, or from whatever the `datasets` library reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
METADATA = "metadata.jsonl"


class Example(NamedTuple):
    """One picture and its caption.

    Attributes:
        name: for messages.
        prompt: the caption.
        open: reads the picture; raises OSError where it is broken.
    """

    name: str
    prompt: str
    open: Callable[[], Image.Image]


def from_folder(folder: Path) -> list[Example]:
    """The pictures of a folder and of those in it, by name.

    A caption stands in `metadata.jsonl` (`file_name`, and `prompt` or `text`), or beside its picture in a `.json` file
    with `prompt`, or in a `.txt` file.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: there are no pictures, or a picture has no caption, or a caption is in no readable form.
    """
    if not folder.is_dir():
        raise NotADirectoryError(
            f"train_data_dir={str(folder)!r} is no directory; give a folder of pictures and captions"
        )
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not pictures:
        raise ValueError(f"train_data_dir={str(folder)!r} has no pictures ({', '.join(ENDINGS)})")
    listed = _read_metadata(folder / METADATA)
    prompts = {path: listed.get(path.relative_to(folder).as_posix()) or _beside(path) for path in pictures}
    bare = [path.name for path, prompt in prompts.items() if not prompt]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(pictures)} pictures in {folder} have no caption, {bare[0]} first; write a "
            f"{METADATA} with file_name and prompt, or a .txt or .json file beside each picture"
        )
    return [
        Example(path.relative_to(folder).as_posix(), prompt, opener(path)) for path, prompt in prompts.items() if prompt
    ]


def opener(path: Path) -> Callable[[], Image.Image]:
    """What reads a picture from a file."""

    def read() -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    return read


def _read_metadata(file: Path) -> dict[str, str]:
    prompts = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), start=1):
        try:
            entry = json.loads(line)
            prompts[entry["file_name"]] = entry["prompt"] if "prompt" in entry else entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {file} has no file_name and prompt ({error!r})") from None
    return prompts


def _beside(picture: Path) -> str | None:
    as_json, as_text = picture.with_suffix(".json"), picture.with_suffix(".txt")
    if as_json.is_file():
        try:
            return str(json.loads(as_json.read_text(encoding="utf-8"))["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{as_json} has no prompt ({error!r})") from None
    return as_text.read_text(encoding="utf-8").strip() if as_text.is_file() else None


def from_dataset(rows: Any, image_column: str, caption_column: str) -> list[Example]:
    """The rows of a dataset of the `datasets` library.

    Raises:
        ValueError: there are no such columns.
    """
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in rows.column_names:
            raise ValueError(f"{option}={column!r} is not among the dataset's columns {rows.column_names}")

    def opener(number: int) -> Callable[[], Image.Image]:
        return lambda: rows[number][image_column].convert("RGB")

    return [Example(f"row {number}", prompt, opener(number)) for number, prompt in enumerate(rows[caption_column])]
