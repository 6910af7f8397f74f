"""Prompts from a file."""

from __future__ import annotations

from pathlib import Path


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file, empty ones left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no prompts, or is no text in UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"prompts={str(file)!r} is no file; give a text file with a prompt on each line")
    try:
        # Some editors of Windows put a mark before the first line.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={str(file)!r} is no text in UTF-8 ({error}); save it as UTF-8") from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={str(file)!r} has no prompts; write one on each line")
    return prompts
