"""Pictures with captions: from a folder of files or tar shards, or from whatever the `datasets` library reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
METADATA = "metadata.jsonl"
SHARD = ".tar"


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
    """The pictures of a folder, of those in it and of the tar shards in them (as webdataset packs them), by name.

    A caption stands in `metadata.jsonl` (`file_name`, and `prompt` or `text`), or beside its picture in a `.json` file
    with `prompt`, or in a `.txt` file.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: there are no pictures, or a picture has no caption, or a caption or a shard is in no readable form.
    """
    if not folder.is_dir():
        raise NotADirectoryError(
            f"train_data_dir={str(folder)!r} is no directory; give a folder of pictures and captions"
        )
    files = dict(_files(folder))
    pictures = [name for name in files if PurePosixPath(name).suffix.lower() in ENDINGS]
    if not pictures:
        raise ValueError(f"train_data_dir={str(folder)!r} has no pictures ({', '.join(ENDINGS)})")
    listed = _listed(files[METADATA]()) if METADATA in files else {}
    prompts = {name: listed.get(name) or _beside(name, files) for name in pictures}
    bare = [name for name, prompt in prompts.items() if not prompt]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(pictures)} pictures in {folder} have no caption, {bare[0]} first; write a "
            f"{METADATA} with file_name and prompt, or a .txt or .json file beside each picture"
        )
    return [Example(name, prompt, opener(files[name])) for name, prompt in prompts.items() if prompt]


def _files(folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each file's name in the folder, and what reads it; a shard's files as if it were a folder."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() == SHARD:
            yield from ((f"{name}/{member}", read) for member, read in _members(path))
        elif path.is_file():
            yield name, path.read_bytes


def _members(shard: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    def reader(start: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            with shard.open("rb") as file:
                file.seek(start)
                return file.read(size)

        return read

    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, reader(member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is no whole tar file ({error})") from None


def opener(read_bytes: Callable[[], bytes]) -> Callable[[], Image.Image]:
    """What opens a picture from its file's bytes."""

    def read() -> Image.Image:
        with Image.open(io.BytesIO(read_bytes())) as image:
            return image.convert("RGB")

    return read


def _listed(metadata: bytes) -> dict[str, str]:
    prompts = {}
    for number, line in enumerate(metadata.decode().splitlines(), start=1):
        try:
            entry = json.loads(line)
            prompts[entry["file_name"]] = entry["prompt"] if "prompt" in entry else entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {METADATA} has no file_name and prompt ({error!r})") from None
    return prompts


def _beside(picture: str, files: Mapping[str, Callable[[], bytes]]) -> str | None:
    as_json, as_text = (str(PurePosixPath(picture).with_suffix(ending)) for ending in (".json", ".txt"))
    if as_json in files:
        try:
            return str(json.loads(files[as_json]())["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{as_json} has no prompt ({error!r})") from None
    return files[as_text]().decode().strip() if as_text in files else None


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
