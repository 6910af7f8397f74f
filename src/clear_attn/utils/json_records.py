"""Read JSON written by this library, or by anyone: every error names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args

Fields = Mapping[str, type | UnionType]


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON in UTF-8.
    """
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: text, or bytes in UTF-8.
        where: the name of the text in errors.

    Raises:
        ValueError: it is not JSON, or Python cannot read it.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # wrong UTF-8, wrong JSON, integers that are too long; nesting
        raise ValueError(f"{where} is not readable as JSON ({error}); save or fetch it again") from error


def validate_record(values: Any, fields: Fields, where: str) -> dict[str, Any]:
    """Return a record with None for each field that may be None and is absent.

    Args:
        values: the record, as read from JSON.
        fields: the type of each known field, such as ``str | None``. Others are returned unchanged.
        where: the name of the record in errors.

    Raises:
        ValueError: the record is not a JSON object, or a field is missing or has another type.

    Examples:
        >>> validate_record({"window": 8}, {"window": int, "source": str | None}, "clear_config.json")
        {'window': 8, 'source': None}
        >>> validate_record({"window": [8]}, {"window": int}, "clear_config.json")
        Traceback (most recent call last):
        ValueError: clear_config.json has window=[8], which must be int; save or fetch it again
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{where} must hold a JSON object, got {shorten(values)}; save or fetch it again")
    record = dict(values)
    for name, kind in fields.items():
        if name not in record and _matches(None, kind):
            record[name] = None
        if name not in record:
            raise ValueError(f"{where} has no {name!r}; save or fetch it again")
        if not _matches(record[name], kind):
            raise ValueError(
                f"{where} has {name}={shorten(record[name])}, which must be {_name(kind)}; save or fetch it again"
            )
    return record


def shorten(value: Any, length: int = 80) -> str:
    """Return a value as a short text for an error."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer that is too long to print; nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else text[: length - 3] + "..."


def _matches(value: Any, kind: type | UnionType) -> bool:
    # In Python, but not in JSON, true is an integer.
    return isinstance(value, kind) and (not isinstance(value, bool) or bool in (kind, *get_args(kind)))


def _name(kind: type | UnionType) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
