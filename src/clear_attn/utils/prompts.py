"""Prompts from a file."""

from __future__ import annotations

from pathlib import Path


def read_prompts(file: Path) -> list[str]:
    """Return the lines of a text file, without empty ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no prompts, or is not text in UTF-8.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "prompts.txt")
        ...     _ = file.write_text("a red circle\\n\\na white cross\\n")
        ...     read_prompts(file)
        ['a red circle', 'a white cross']
    """
    if not file.is_file():
        raise FileNotFoundError(f"prompts={str(file)!r} does not exist; give a text file with a prompt per line")
    try:
        # Some editors on Windows write a mark before the first line.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={str(file)!r} is not text in UTF-8 ({error}); save it as UTF-8") from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={str(file)!r} has no prompts; write one per line")
    return prompts
