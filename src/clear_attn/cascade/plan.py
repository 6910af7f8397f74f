"""All that a picture is made from, as plain data: kept beside it and in it, so that it can be made again."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from clear_attn.cascade.stages import Base, Stage
from clear_attn.methods.schedule import Schedule
from clear_attn.patching.target import find_transformer
from clear_attn.weights.published import shared_name_of
from clear_attn.weights.sources import shared_name

FORMAT = 2
READABLE = (1, 2)
# The name of a PNG file's text entry.
PNG_ENTRY = "clear_attn"


def software() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("clear_attn", "diffusers", "torch")}


def fingerprint(image: Image.Image) -> dict[str, Any]:
    """Return what tells one image from another."""
    pixels = image.convert("RGB").tobytes()
    return {"sha256": hashlib.sha256(pixels).hexdigest(), "height": image.height, "width": image.width}


def describe(pipe: Any) -> dict[str, Any]:
    """Return what a pipeline is, as far as an image depends on it and its weights do not say."""
    transformer, _ = find_transformer(pipe)
    schedule = json.loads(pipe.scheduler.to_json_string())
    return {
        "pipeline": type(pipe).__name__,
        "name": shared_name_of(pipe, transformer),
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            "config": {name: value for name, value in schedule.items() if not name.startswith("_")},
        },
        "adapters": _active_adapters(pipe),
    }


def _active_adapters(pipe: Any) -> list[str]:
    try:
        return list(pipe.get_active_adapters())
    except (AttributeError, ValueError):  # a pipeline that takes none, or no peft
        return []


@dataclass(frozen=True)
class HighresPlan:
    """What `highres` draws. The same plan draws the same picture, as far as the same software and device do.

    Attributes:
        prompt (`str`), height, width (`int`, pixels): of the picture.
        base (`Base`, *optional*): of the first image, sizes and steps filled in; None where one was given.
        stages: those after it, sizes and NTK factors filled in.
        seed (`int`): of the base image's noise; stage number n draws its noise from seed + n.
        window, down_factor, schedule, weights, revision, backend: of `linearize`.
        options: further keywords of the pipelines' calls.
        image (*optional*): of the image given, `sha256` of its pixels, `height` and `width`.
        model: `pipeline`, its class; `name`, its Hub id or the name of its folder; `dtype`; `scheduler`, its class
            and config; `adapters`, the names of active LoRAs.
        made_with: versions.
    """

    prompt: str
    height: int
    width: int
    base: Base | None
    stages: tuple[Stage, ...]
    seed: int
    window: int | None
    down_factor: int | None
    weights: str | None
    revision: str | None = None
    backend: str = "auto"
    schedule: Schedule | None = None
    options: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=software)

    @property
    def drawn(self) -> tuple[Base | Stage, ...]:
        """The settings of each image that is drawn: the base image, unless one was given, and each stage."""
        return (self.base, *self.stages) if self.base else self.stages

    def arguments(self) -> dict[str, Any]:
        """The keywords that make `clear_attn.highres(pipe, **plan.arguments())` draw it again; add the image given."""
        names = ("prompt", "height", "width", "base", "stages", "seed")
        how = ("window", "down_factor", "schedule", "weights", "revision", "backend")
        return {**{name: getattr(self, name) for name in (*names, *how)}, **self.options}

    def without_places(self) -> HighresPlan:
        """The plan with the name alone of weights on this machine: where they lie is for nobody who sees a picture."""
        return self if self.weights is None else dataclasses.replace(self, weights=shared_name(self.weights))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "this text") -> HighresPlan:
        """Reads what `to_json` wrote, also in format 1.

        Raises:
            ValueError: it is something else, or of another format.
        """
        try:
            values = json.loads(text)
            if values.pop("format") not in READABLE:
                version = values.get("made_with", {}).get("clear_attn", "another version")
                raise ValueError(f"its format was written by clear_attn {version}; draw it with that version")
            base, schedule = values.pop("base"), values.pop("schedule", None)
            return cls(
                base=Base(**base) if base else None,
                stages=tuple(Stage(**stage) for stage in values.pop("stages")),
                schedule=None if schedule is None else Schedule.from_dict(schedule),
                **values,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is no plan of a high-resolution picture: {error}") from error

    @classmethod
    def load(cls, file: Path | str) -> HighresPlan:
        """Reads the JSON file beside a picture, or the PNG picture itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no plan.
        """
        file = Path(file)
        if file.suffix.lower() != ".png":
            return cls.from_json(file.read_text(encoding="utf-8"), str(file))
        text = _png_entry(file)
        if text is None:
            raise ValueError(f"{file} has no text entry {PNG_ENTRY!r}; give a picture that clear_attn saved")
        return cls.from_json(text, str(file))


def _png_entry(file: Path) -> str | None:
    """Of a picture of any size, where PIL's own `open` has a limit."""
    try:
        with PngImageFile(file) as picture:
            return picture.text.get(PNG_ENTRY)
    except SyntaxError as error:
        raise ValueError(f"{file} is no PNG picture ({error}); give one that clear_attn saved") from None
