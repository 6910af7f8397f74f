"""The record of a linearized model, in clear_config.json and in the config of its transformer.

Writers use format 2. Readers accept format 1 too, in which CLEAR's window and down_factor were separate fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_attn.methods import Method
from clear_attn.methods.records import method_from_dict
from clear_attn.methods.schedule import Schedule
from clear_attn.utils.json_records import read_json, shorten, validate_record
from clear_attn.utils.versions import installed_version

CONFIG_FILE = "clear_config.json"
WEIGHTS_FILE = "clear_weights.safetensors"
FORMAT = 2
READABLE = (1, 2)
RECORD_FIELDS = {
    "architecture": str,
    "base_model": str | None,
    "model": str | None,
    "source": str | None,
    "training": dict | None,
}
ENTRY_FIELDS = {"architecture": str, "weights": str | None, "source": str | None, "training": dict | None}
# The entry in a linearized transformer's config. It identifies a pipeline that was saved while it was linearized.
CONFIG_ENTRY = "clear_attn"
IN_CONFIG = f"the entry {CONFIG_ENTRY} in the config of this transformer"


@dataclass(frozen=True)
class Record:
    """The record of distilled weights.

    Attributes:
        method (`Method`): the method that they were distilled for.
        architecture (`str`): the transformer class in diffusers.
        base_model (`str`, *optional*): the Hub id of their model.
        model (`str`, *optional*): the Hub id of their model, or the name of its folder.
        source (`str`, *optional*): their first origin, such as the published file, which sets their license.
        schedule (`Schedule`): the schedule that they are used with.
        training (`dict`, *optional*): facts about their training, such as its steps, data and resolution.
    """

    method: Method
    architecture: str
    base_model: str | None = None
    source: str | None = None
    schedule: Schedule = Schedule()
    model: str | None = None
    training: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Return the text of a clear_config.json."""
        values = {
            "format": FORMAT,
            "method": self.method.to_dict(),
            "architecture": self.architecture,
            "schedule": self.schedule.to_dict(),
            "base_model": self.base_model,
            "model": self.model,
            "source": self.source,
            "training": self.training,
            "library_version": installed_version("clear_attn"),
        }
        return json.dumps(values, indent=2) + "\n"


def read_method(values: Mapping[str, Any], where: str = IN_CONFIG) -> Method:
    """Return the method of a record; errors name the record as `where`.

    Raises:
        ValueError: the method is missing, unknown or cannot be read.
    """
    record = validate_record(values, {"method": dict | None}, where)["method"]
    if record:
        return method_from_dict(record, where)
    own = validate_record(values, {"window": int, "down_factor": int}, where)
    return method_from_dict(
        {"name": "Clear", "settings": {name: own[name] for name in ("window", "down_factor")}}, where
    )


def read_schedule(values: Mapping[str, Any], where: str = IN_CONFIG) -> Schedule:
    """Return the schedule of a record, which may have none; errors name the record as `where`.

    Raises:
        ValueError: it cannot be read.
    """
    return Schedule.from_dict(validate_record(values, {"schedule": dict | None}, where)["schedule"] or {}, where)


def read_record(file: Path) -> Record:
    """Read a clear_config.json.

    Raises:
        ValueError: the file is not a record, or has another format.
    """
    where = str(file)
    values = read_json(file)
    check_format(values, where)
    fields = validate_record(values, RECORD_FIELDS, where)
    return Record(
        read_method(values, where),
        schedule=read_schedule(values, where),
        **{name: fields[name] for name in RECORD_FIELDS},
    )


def check_format(values: Any, where: str) -> None:
    """Raise ValueError for a record of a format that this version cannot read."""
    record = validate_record(values, {"format": int, "library_version": str | None}, where)
    found = record["format"]
    if found not in READABLE:
        version = record["library_version"] or "another version"
        raise ValueError(
            f"{where} is of format {shorten(found)}, written by clear_attn {version}, and this version reads {FORMAT}; "
            "update clear_attn (pip install -U clear_attn), or save the weights again"
        )


def make_metadata(
    transformer: Any,
    method: Method,
    schedule: Schedule,
    weights: str | None,
    source: str | None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the config entry of a linearized transformer.

    Args:
        transformer, method, schedule: the transformer, and its method and schedule.
        weights: the name of its distilled weights; None for its own.
        source: the first origin of these weights; None for its own.
        training: facts about their training.
    """
    return {
        "format": FORMAT,
        "architecture": type(transformer).__name__,
        "method": method.to_dict(),
        "schedule": schedule.to_dict(),
        "weights": weights,
        "source": source,
        "training": training,
    }


def metadata_of(transformer: Any) -> dict[str, Any] | None:
    """Return the entry in a transformer's config, or None.

    Raises:
        ValueError: it cannot be read, or is of another format.
    """
    entry = transformer.config.get(CONFIG_ENTRY)
    if entry is None:
        return None
    try:
        check_format(entry, IN_CONFIG)
        metadata = validate_record(entry, ENTRY_FIELDS, IN_CONFIG)
    except ValueError as error:
        remedy = f"or remove the entry by transformer.register_to_config({CONFIG_ENTRY}=None)"
        raise ValueError(f"{error}, {remedy}") from error
    # ControlNet.from_transformer() copies the transformer's config.
    return metadata if metadata["architecture"] == type(transformer).__name__ else None
