"""Images with captions, from a folder of files or tar shards, or from the `datasets` library."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from clear_attn.utils.json_records import parse_json, shorten, validate_record

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
METADATA = "metadata.jsonl"
SHARD = ".tar"


class Example(NamedTuple):
    """An image and its caption.

    Attributes:
        name: the name of the image in messages.
        prompt: the caption.
        open: reads the image and applies its orientation; raises if it is broken.
        fingerprint: returns a value that changes with the image: the file's size, or the dataset's fingerprint.
    """

    name: str
    prompt: str
    open: Callable[[], Image.Image]
    fingerprint: Callable[[], int | str]


class _File(NamedTuple):
    read: Callable[[], bytes]
    size: Callable[[], int]


def on_disk(path: Path, prompt: str) -> Example:
    """Return the example of an image file, which may not exist yet."""
    return _example(path.name, prompt, _on_disk(path))


def _example(name: str, prompt: str, file: _File) -> Example:
    def opened() -> Image.Image:
        with Image.open(io.BytesIO(file.read())) as image:
            return upright(image)

    return Example(name, prompt, opened, file.size)


def upright(image: Image.Image) -> Image.Image:
    """Return an image in RGB, rotated by its EXIF orientation."""
    return ImageOps.exif_transpose(image).convert("RGB")


def from_folder(folder: Path) -> list[Example]:
    """Return the images in a folder, its subfolders and their webdataset tar shards, sorted by name.

    Captions are in `metadata.jsonl` (`file_name`, and `prompt` or `text`), or next to the image in a `.json` file
    (`prompt`) or a `.txt` file with its name.

    Raises:
        NotADirectoryError: the folder does not exist.
        ValueError: there are no images, an image has no caption, or a caption or a shard cannot be read.
    """
    if not folder.is_dir():
        raise NotADirectoryError(
            f"train_data_dir={str(folder)!r} is not a directory; give a folder of images and captions"
        )
    files = dict(_files(folder))
    images = [name for name in files if PurePosixPath(name).suffix.lower() in ENDINGS]
    if not images:
        raise ValueError(f"train_data_dir={str(folder)!r} has no images ({', '.join(ENDINGS)})")
    listed = read_metadata(folder / METADATA) if METADATA in files else {}
    prompts = {name: listed.get(name) or _caption_file(name, files) for name in images}
    uncaptioned = [name for name, prompt in prompts.items() if not (prompt and prompt.strip())]
    if uncaptioned:
        raise ValueError(
            f"{len(uncaptioned)} of {len(images)} images in {folder} have no caption, {uncaptioned[0]} first; write a "
            f"{METADATA} with file_name and prompt, or a .txt or .json file with each image's name"
        )
    return [_example(name, prompt, files[name]) for name, prompt in prompts.items() if prompt]


def _files(folder: Path) -> Iterator[tuple[str, _File]]:
    """Yield the files of a folder by name, and a shard's files as if it were a folder."""
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
        raise ValueError(f"{shard} is not a complete tar file ({error}); pack it again") from None


def read_metadata(metadata: Path) -> dict[str, str]:
    """Return the captions in a `metadata.jsonl` by file name, without empty lines.

    Raises:
        ValueError: a line has no file name or caption.
    """
    prompts = {}
    # Not splitlines, which also splits where JSON does not: at U+2028 inside a caption.
    for number, line in enumerate(_text(metadata.read_bytes, str(metadata)).split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {metadata}"
            entry = validate_record(parse_json(line, where), {"file_name": str}, where)
            prompts[entry["file_name"]] = _caption(entry.get("prompt", entry.get("text")), where)
    return prompts


def _caption_file(image: str, files: Mapping[str, _File]) -> str | None:
    as_json, as_text = (str(PurePosixPath(image).with_suffix(ending)) for ending in (".json", ".txt"))
    if as_json in files:
        entry = validate_record(parse_json(_text(files[as_json].read, as_json), as_json), {}, as_json)
        return _caption(entry.get("prompt"), as_json)
    return _text(files[as_text].read, as_text).strip() if as_text in files else None


def _caption(value: Any, where: str) -> str:
    """Check that a caption is text that tokenizers can encode, and return it."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must have one text as its prompt, got {shorten(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a prompt that is not Unicode text ({error}); write it again") from None
    return value


def _text(read: Callable[[], bytes], name: str) -> str:
    try:
        return read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8 ({error}); save it as UTF-8") from None


def from_dataset(rows: Any, image_column: str, caption_column: str) -> list[Example]:
    """Return the rows of a dataset of the `datasets` library.

    Raises:
        ValueError: there are no rows, a column is missing, the image column has no images, or a row has no caption.
    """
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in rows.column_names:
            raise ValueError(f"{option}={column!r} is not among the dataset's columns; give one of {rows.column_names}")
    if not len(rows):
        raise ValueError("the dataset has no rows")
    if not isinstance(rows[0][image_column], Image.Image):
        kind = type(rows[0][image_column]).__name__
        raise ValueError(f"image_column={image_column!r} has a {kind}, not an image; cast it to datasets.Image")

    def example(number: int, prompt: Any) -> Example:
        name = f"row {number}"
        if not _caption(prompt, f"caption_column={caption_column!r} of {name}").strip():
            raise ValueError(f"caption_column={caption_column!r} of {name} is empty; write a caption for each image")
        return Example(name, prompt, lambda: upright(rows[number][image_column]), lambda: str(rows._fingerprint))

    return [example(number, prompt) for number, prompt in enumerate(rows[caption_column])]


def check_same_origin(theirs: Mapping[str, Any], ours: NamedTuple, what: str) -> None:
    """Raise ValueError, with a message that starts with `what`, if a folder was made with other settings."""
    for name, value in ours._asdict().items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{what} for {name} {theirs.get(name)!r}, not {value!r}; give another folder, or delete this one"
            )
