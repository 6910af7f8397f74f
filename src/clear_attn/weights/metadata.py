"""What is written down of a linearized model: beside its weights in clear_config.json, and in its own config."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_attn.methods import Method, named
from clear_attn.methods.schedule import Schedule
from clear_attn.utils.validation import ClearConfig

CONFIG_FILE = "clear_config.json"
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """Of distilled weights.

    Attributes:
        config (`ClearConfig` or `Method`): what they were distilled for.
        architecture (`str`): the class of transformer in diffusers.
        base_model (`str`, *optional*): the Hub id of the model that they are for.
        source (`str`, *optional*): where they first came from: the published file, say, whose licence they keep.
        schedule (`Schedule`): what they are used with.
    """

    config: ClearConfig | Method
    architecture: str
    base_model: str | None = None
    source: str | None = None
    schedule: Schedule = Schedule()

    def to_json(self) -> str:
        """The text of a clear_config.json."""
        values = {
            "format": FORMAT,
            **settings_of(self.config),
            "architecture": self.architecture,
            "schedule": dataclasses.asdict(self.schedule),
            "base_model": self.base_model,
            "source": self.source,
            "library_version": importlib.metadata.version("clear_attn"),
        }
        return json.dumps(values, indent=2) + "\n"


def settings_of(config: ClearConfig | Method) -> dict[str, Any]:
    """CLEAR's two numbers, or the name and settings of another method, for a file."""
    return {"method": config.settings()} if isinstance(config, Method) else dataclasses.asdict(config)


def config_of(values: Mapping[str, Any]) -> ClearConfig | Method:
    """What `settings_of` wrote down, found among other values.

    Raises:
        KeyError: it is not there.
        TypeError, ValueError: a value out of range; an unknown method.
    """
    method = values.get("method")
    return named(method) if method else ClearConfig(values["window"], values["down_factor"])


def read_record(file: Path) -> Record:
    """Reads a clear_config.json.

    Raises:
        ValueError: it is no such file, or of another format.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        check_format(values, str(file))
        config = config_of(values)
        schedule = Schedule(**values.get("schedule", {}))
        return Record(config, str(values["architecture"]), values["base_model"], values["source"], schedule)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no whole {CONFIG_FILE} ({error}); save or fetch it again") from error


def check_format(values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where something was written down in a format that this version cannot read."""
    found = values["format"]
    if found != FORMAT:
        version = values.get("library_version", "another version")
        raise ValueError(
            f"{where} is of format {found!r}, written by clear_attn {version}, and this version reads {FORMAT}; "
            "update clear_attn (pip install -U clear_attn), or save the weights anew"
        )


# The entry in a linearized transformer's config, by which one that was saved whole is recognised.
MARK = "clear_attn"


def make_mark(
    transformer: Any, config: ClearConfig | Method, schedule: Schedule, weights: str | None, source: str | None
) -> dict[str, Any]:
    """Of a transformer that was linearized with weights of this name and first source, or with its own (None)."""
    return {
        "format": FORMAT,
        "architecture": type(transformer).__name__,
        **settings_of(config),
        "schedule": dataclasses.asdict(schedule),
        "weights": weights,
        "source": source,
    }


def mark_of(transformer: Any) -> dict[str, Any] | None:
    """The entry in a transformer's config, or None.

    Raises:
        ValueError: it is of another format.
    """
    mark: dict[str, Any] | None = transformer.config.get(MARK)
    if not mark:
        return None
    check_format(mark, "the config of this transformer")
    # A ControlNet that is made from a transformer gets the transformer's config.
    return mark if mark["architecture"] == type(transformer).__name__ else None


def schedule_of_mark(mark: Mapping[str, Any]) -> Schedule:
    """The schedule that is written down in an entry."""
    return Schedule(**mark.get("schedule", {}))
