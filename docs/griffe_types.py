"""An extension of griffe for docstrings in the style of diffusers: `name (`int`, *optional*, defaults to 1): ...`.

griffe would print that text as the type, and reads one name per line. With this extension the type is the annotation in
the signature, with links, and a line with several names becomes one line for each.
"""

import re
from collections.abc import Container
from typing import Any

import griffe

# A line of a section and what is indented under it.
ENTRY = re.compile(
    r"^ {4}(?P<names>[\w*][\w*., ]*?)(?: \((?P<type>(?:[^()]|\(\))*)\))?:(?P<text>.*(?:\n {5}.*)*)", re.MULTILINE
)
# What a section says of no name: `And the errors of ...`.
SENTENCE = re.compile(r"^ {4}(?P<text>And .*(?:\n {5}.*)*)\n?", re.MULTILINE)
# A default that the signature does not show, for it is no literal.
DEFAULT = re.compile(r"defaults to (?!`|\d|none$)(?P<words>.*)", re.DOTALL)


def split_names(section: str, untyped: Container[str] = ()) -> str:
    """Return a section with a line for each name, and types only for the names without annotation."""

    def lines(entry: re.Match[str]) -> str:
        kind = entry["type"] or ""
        default = DEFAULT.search(kind)
        text = f"{entry['text']} Defaults to {default['words']}." if default else entry["text"]
        plain = f" ({kind.replace('`', '').partition(',')[0]})" if kind else ""
        return "\n".join(f"    {name}{plain if name in untyped else ''}:{text}" for name in entry["names"].split(", "))

    return ENTRY.sub(lines, section)


def rewrite(section: str, obj: griffe.Object) -> str:
    """Return a section of a docstring as griffe reads it."""
    match section.partition(":\n")[0]:
        case "Args":
            return split_names(section)
        case "Raises":
            sentences = [found["text"] for found in SENTENCE.finditer(section)]
            return "\n\n".join([split_names(SENTENCE.sub("", section)).rstrip(), *sentences, ""])
        case "Attributes":
            names = re.findall(r"\w+", section)
            return split_names(section, untyped={name for name in names if name not in obj.members})
    return section


class DiffusersDocstrings(griffe.Extension):
    """Rewrite the docstrings of functions and classes."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring and (obj.is_function or obj.is_class):
            sections = re.split(r"(?m)^(?=\w+:$)", obj.docstring.value)
            obj.docstring.value = "".join(rewrite(section, obj) for section in sections)
