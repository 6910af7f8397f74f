"""An extension of griffe for types in the style of diffusers: `name (`int`, *optional*, defaults to 1): ...`.

mkdocstrings would print that text as the type. With this extension the type is the annotation in the signature, with
links, and what else the parentheses say begins the description.
"""

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^(?P<name> {4}\w[\w, ]*) \((?P<type>[^)\n]*(?:\n[^)\n]*)?)\):", re.MULTILINE)


def move_note(match: re.Match[str]) -> str:
    """Return an argument's line without its type."""
    _, _, note = match["type"].partition(", ")
    return f"{match['name']}: ({note})" if note else f"{match['name']}:"


class DiffusersTypes(griffe.Extension):
    """Remove types from the arguments in docstrings of functions and classes, and from annotated attributes."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if not obj.docstring or not (obj.is_function or obj.is_class):
            return

        def without_type(match: re.Match[str]) -> str:
            names = match["name"].strip().split(", ")
            return move_note(match) if all(name in obj.members for name in names) else match[0]

        replacements = {"Args:": move_note, "Attributes:": without_type}
        sections = re.split(r"(?m)^(?=\w+:$)", obj.docstring.value)
        obj.docstring.value = "".join(
            ARGUMENT.sub(replacements[name], section)
            if (name := section.partition("\n")[0]) in replacements
            else section
            for section in sections
        )
