"""Read and write methods as JSON and as text."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from clear_attn.methods.method import REGISTRY, Method, known_methods
from clear_attn.utils.json_records import shorten, validate_record


def method_from_dict(record: Mapping[str, Any], where: str = "the record of a method") -> Method:
    """Return the method that `Method.to_dict` wrote.

    Args:
        record: the name and settings.
        where: what errors call the record.

    Raises:
        ValueError: the record cannot be read, no method has that name, or the method has other settings.
    """
    values = validate_record(record, {"name": str, "settings": dict}, where)
    name, fields = values["name"], values["settings"]
    if name not in REGISTRY:
        raise ValueError(
            f"{where}: no attention method is named {shorten(name)}, only {', '.join(known_methods())}; import the "
            "file that defines it"
        )
    method = REGISTRY[name]
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        return method(**fields)
    except (TypeError, ValueError) as error:
        own = ", ".join(field.name for field in dataclasses.fields(method)) or "none"  # type: ignore[arg-type]
        raise ValueError(f"{where}: {name} does not take these settings ({error}); it has: {own}") from error


def record_as_text(record: Mapping[str, Any]) -> str:
    """Return a record of `Method.to_dict` as text, such as `Swin(side=8)`, even if the method is not defined."""
    values = validate_record(record, {"name": str, "settings": dict}, "the record of a method")
    fields = ", ".join(f"{key}={shorten(value)}" for key, value in values["settings"].items())
    return f"{values['name']}({fields})"


def parse(text: str) -> Method:
    """Return the method that a text such as `"Swin(side=8)"` or `"Swin"` describes.

    Raises:
        ValueError: the text cannot be parsed, no method or several have that name, or the method has other settings.

    Examples:
        >>> parse("Swin(side=8)")
        Swin(side=8)
    """
    try:
        call: Any = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        name = ast.unparse(call.func)
        fields = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        if call.args or None in fields:
            raise ValueError
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(
            f"method={text!r} is not a name with settings in parentheses; write it as 'Swin(side=8)'"
        ) from None
    matching = [known for known in REGISTRY if known == name or known.endswith(f".{name}")]
    if name in matching or len(matching) == 1:
        name = name if name in matching else matching[0]
    elif matching:
        raise ValueError(f"method={text!r} may be any of {', '.join(matching)}; write its whole name")
    return method_from_dict({"name": name, "settings": fields})


def validate_method(method: object) -> None:
    """Raise TypeError for a value that is not a method, not a frozen dataclass, or cannot be written as JSON."""
    if not isinstance(method, Method):
        raise TypeError(f"method must be one of clear_attn.methods, such as clear_attn.methods.LiT(), got {method!r}")
    try:
        hash(method)
        found = method_from_dict(json.loads(json.dumps(method.to_dict())))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"method {type(method).__name__} must be a frozen dataclass with fields that JSON can hold, and with "
            f"attend_image and flops: {error}"
        ) from None
    if found != method:
        raise TypeError(f"method {method} is read back from JSON as {found}; give it fields that JSON keeps unchanged")
