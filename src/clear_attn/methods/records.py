"""Methods as JSON and as text."""

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
        where: names the record in errors.

    Raises:
        ValueError: the record cannot be read, no method of that name has been defined, or it takes other settings.
    """
    values = validate_record(record, {"name": str, "settings": dict}, where)
    name, fields = values["name"], values["settings"]
    if name not in REGISTRY:
        raise ValueError(
            f"{where}: no method of attention is named {shorten(name)}, but {', '.join(known_methods())}; import the "
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
    """Return what `Method.to_dict` wrote in one line, as `Swin(side=8)`; the method need not be known."""
    values = validate_record(record, {"name": str, "settings": dict}, "the record of a method")
    fields = ", ".join(f"{key}={shorten(value)}" for key, value in values["settings"].items())
    return f"{values['name']}({fields})"


def parse(text: str) -> Method:
    """Return the method that a text names, with settings where it has them, as `"Swin(side=8)"`.

    Raises:
        ValueError: it does not read so; no method of that name, or several; settings that it does not take.
    """
    try:
        call: Any = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        name = ast.unparse(call.func)
        fields = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        if call.args or None in fields:
            raise ValueError
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(f"method={text!r} is no name with settings in brackets; write it as 'Swin(side=8)'") from None
    fitting = [known for known in REGISTRY if known == name or known.endswith(f".{name}")]
    if name in fitting or len(fitting) == 1:
        name = name if name in fitting else fitting[0]
    elif fitting:
        raise ValueError(f"method={text!r} may be any of {', '.join(fitting)}; write its whole name")
    return method_from_dict({"name": name, "settings": fields})


def validate_method(method: object) -> None:
    """Raise TypeError for what is no method, no frozen dataclass, or holds what JSON cannot."""
    if not isinstance(method, Method):
        raise TypeError(f"method must be one of clear_attn.methods, as clear_attn.methods.LiT(), got {method!r}")
    try:
        hash(method)
        found = method_from_dict(json.loads(json.dumps(method.to_dict())))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"method {type(method).__name__} must be a frozen dataclass of numbers, texts and the like, which JSON "
            f"can hold, with attend_image and flops: {error}"
        ) from None
    if found != method:
        raise TypeError(f"method {method} does not come back the same from a file: {found}; give it plain fields")
