"""Pictures with captions: from a folder of files or tar shards, or from whatever the `datasets` library reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image, ImageOps

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
METADATA = "metadata.jsonl"
SHARD = ".tar"


class Example(NamedTuple):
    """One picture and its caption.

    Attributes:
        name: for messages.
        prompt: the caption.
        open: reads the picture, the right way up; raises where it is broken.
        stamp: what is another when the picture is: the file's size, or its dataset's fingerprint.
    """

    name: str
    prompt: str
    open: Callable[[], Image.Image]
    stamp: Callable[[], int | str]


class _File(NamedTuple):
    read: Callable[[], bytes]
    size: Callable[[], int]


def on_disk(path: Path, prompt: str) -> Example:
    """An example whose picture is a file, which need not be there yet."""
    return _example(path.name, prompt, _on_disk(path))


def _example(name: str, prompt: str, file: _File) -> Example:
    def opened() -> Image.Image:
        with Image.open(io.BytesIO(file.read())) as image:
            return upright(image)

    return Example(name, prompt, opened, file.size)


def upright(image: Image.Image) -> Image.Image:
    """A picture as it was taken, not as its file stores it."""
    return ImageOps.exif_transpose(image).convert("RGB")


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
    listed = listed_in(folder / METADATA) if METADATA in files else {}
    prompts = {name: listed.get(name) or _beside(name, files) for name in pictures}
    bare = [name for name, prompt in prompts.items() if not prompt]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(pictures)} pictures in {folder} have no caption, {bare[0]} first; write a "
            f"{METADATA} with file_name and prompt, or a .txt or .json file beside each picture"
        )
    return [_example(name, prompt, files[name]) for name, prompt in prompts.items() if prompt]


def _files(folder: Path) -> Iterator[tuple[str, _File]]:
    """Each file's name in the folder, and the file; a shard's files as if it were a folder."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() == SHARD:
            yield from ((f"{name}/{member}", file) for member, file in _members(path))
        elif path.is_file():
            yield name, _on_disk(path)


def _on_disk(path: Path) -> _File:
    return _File(path.read_bytes, lambda: path.stat().st_size)


def _part_of(path: Path, start: int, size: int) -> _File:
    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    return _File(read, lambda: size)


def _members(shard: Path) -> Iterator[tuple[str, _File]]:
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, _part_of(shard, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is no whole tar file ({error})") from None


def listed_in(metadata: Path) -> dict[str, str]:
    """The captions in a `metadata.jsonl`, by file name.

    Raises:
        ValueError: a line has no file name or caption.
    """
    prompts = {}
    for number, line in enumerate(_text(metadata.read_bytes, str(metadata)).splitlines(), start=1):
        try:
            entry = json.loads(line)
            prompts[entry["file_name"]] = entry["prompt"] if "prompt" in entry else entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {metadata} has no file_name and prompt ({error!r})") from None
    return prompts


def _beside(picture: str, files: Mapping[str, _File]) -> str | None:
    as_json, as_text = (str(PurePosixPath(picture).with_suffix(ending)) for ending in (".json", ".txt"))
    if as_json in files:
        try:
            return str(json.loads(_text(files[as_json].read, as_json))["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{as_json} has no prompt ({error!r})") from None
    return _text(files[as_text].read, as_text).strip() if as_text in files else None


def _text(read: Callable[[], bytes], name: str) -> str:
    try:
        return read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8 ({error}); save it as UTF-8") from None


def from_dataset(rows: Any, image_column: str, caption_column: str) -> list[Example]:
    """The rows of a dataset of the `datasets` library.

    Raises:
        ValueError: there are no rows, no such columns, no pictures in the one, or a row has no caption in the other.
    """
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in rows.column_names:
            raise ValueError(f"{option}={column!r} is not among the dataset's columns {rows.column_names}")
    if not len(rows):
        raise ValueError("the dataset has no rows")
    if not isinstance(rows[0][image_column], Image.Image):
        kind = type(rows[0][image_column]).__name__
        raise ValueError(f"image_column={image_column!r} holds a {kind}, no pictures; cast it to datasets.Image")
    prompts = rows[caption_column]
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"caption_column={caption_column!r} has {prompt!r} in row {number}; it must have one text in each"
            )

    def opener(number: int) -> Callable[[], Image.Image]:
        return lambda: upright(rows[number][image_column])

    def stamp() -> str:
        return str(rows._fingerprint)

    return [Example(f"row {number}", prompt, opener(number), stamp) for number, prompt in enumerate(prompts)]


def check_same_origin(theirs: Mapping[str, Any], ours: NamedTuple, what: str) -> None:
    """Raise ValueError where a folder's content is of something else; `what` begins the message."""
    for name, value in ours._asdict().items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{what} for {name} {theirs.get(name)!r}, not {value!r}; give another folder, or delete this one"
            )
