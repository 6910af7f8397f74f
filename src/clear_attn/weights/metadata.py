"""What is recorded of a linearized model: in clear_config.json, and in the config of its transformer.

Writers use format 2; readers take format 1 too, in which CLEAR's window and down_factor were fields of their own.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_attn.methods import Clear, Method
from clear_attn.methods.records import method_from_dict
from clear_attn.methods.schedule import Schedule

CONFIG_FILE = "clear_config.json"
FORMAT = 2
READABLE = (1, 2)
# The entry in a linearized transformer's config, by which one that was saved whole is recognized.
CONFIG_ENTRY = "clear_attn"


@dataclass(frozen=True)
class Record:
    """Of distilled weights.

    Attributes:
        method (`Method`): what they were distilled for.
        architecture (`str`): the class of transformer in diffusers.
        base_model (`str`, *optional*): the Hub id of the model that they are for.
        source (`str`, *optional*): where they first came from: the published file, say, whose license they keep.
        schedule (`Schedule`): what they are used with.
    """

    method: Method
    architecture: str
    base_model: str | None = None
    source: str | None = None
    schedule: Schedule = Schedule()

    def to_json(self) -> str:
        """Return the text of a clear_config.json."""
        values = {
            "format": FORMAT,
            "method": self.method.to_dict(),
            "architecture": self.architecture,
            "schedule": self.schedule.to_dict(),
            "base_model": self.base_model,
            "source": self.source,
            "library_version": importlib.metadata.version("clear_attn"),
        }
        return json.dumps(values, indent=2) + "\n"


def read_method(values: Mapping[str, Any]) -> Method:
    """Return the method of a record.

    Raises:
        KeyError: it is not there.
        TypeError, ValueError: a value out of range; an unknown method.
    """
    method = values.get("method")
    return method_from_dict(method) if method else Clear(values["window"], values["down_factor"])


def read_schedule(values: Mapping[str, Any]) -> Schedule:
    """Return the schedule of a record; it may have none."""
    return Schedule.from_dict(values.get("schedule", {}))


def read_record(file: Path) -> Record:
    """Read a clear_config.json.

    Raises:
        ValueError: it is no such file, or of another format.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        check_format(values, str(file))
        method, schedule = read_method(values), read_schedule(values)
        return Record(method, str(values["architecture"]), values["base_model"], values["source"], schedule)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no whole {CONFIG_FILE} ({error}); save or fetch it again") from error


def check_format(values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a record of a format that this version cannot read."""
    found = values["format"]
    if found not in READABLE:
        version = values.get("library_version", "another version")
        raise ValueError(
            f"{where} is of format {found!r}, written by clear_attn {version}, and this version reads {FORMAT}; "
            "update clear_attn (pip install -U clear_attn), or save the weights again"
        )


def make_metadata(
    transformer: Any, method: Method, schedule: Schedule, weights: str | None, source: str | None
) -> dict[str, Any]:
    """Return the entry of a transformer that was linearized with weights of this name and first source.

    With its own weights, these are None.
    """
    return {
        "format": FORMAT,
        "architecture": type(transformer).__name__,
        "method": method.to_dict(),
        "schedule": schedule.to_dict(),
        "weights": weights,
        "source": source,
    }


def metadata_of(transformer: Any) -> dict[str, Any] | None:
    """Return the entry in a transformer's config, or None.

    Raises:
        ValueError: it is of another format.
    """
    metadata: dict[str, Any] | None = transformer.config.get(CONFIG_ENTRY)
    if not metadata:
        return None
    check_format(metadata, "the config of this transformer")
    # A ControlNet that is made from a transformer gets the transformer's config.
    return metadata if metadata["architecture"] == type(transformer).__name__ else None
