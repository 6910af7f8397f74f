"""All that a picture is made from, as plain data: kept beside it and in it, so that it can be made again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from clear_attn.highres.stages import Base, Stage

FORMAT = 1
# The name of a PNG file's text entry.
PNG_ENTRY = "clear_attn"


def software() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("clear_attn", "diffusers", "torch")}


@dataclass(frozen=True)
class HighresPlan:
    """What `highres` draws. The same plan draws the same picture, as far as the same software and device do.

    Attributes:
        prompt (`str`), height, width (`int`, pixels): of the picture.
        base (`Base`, *optional*): of the first image, sizes and steps filled in; None where one was given.
        stages: those after it, sizes and NTK factors filled in.
        seed (`int`): of the base image's noise; stage number n draws its noise from seed + n.
        window, down_factor, weights: of `linearize`.
        options: further keywords of the pipelines' calls.
        image (*optional*): of the image given, `sha256` of its pixels, `height` and `width`.
        model: `pipeline`, its class; `name`, its Hub id or the name of its folder; `dtype`.
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
    options: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=software)

    def arguments(self) -> dict[str, Any]:
        """The keywords that make `clear_attn.highres(pipe, **plan.arguments())` draw it again; add the image given."""
        names = ("prompt", "height", "width", "base", "stages", "seed", "window", "down_factor", "weights")
        return {**{name: getattr(self, name) for name in names}, **self.options}

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "this text") -> HighresPlan:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it is something else, or of another format.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                version = values.get("made_with", {}).get("clear_attn", "another version")
                raise ValueError(f"its format was written by clear_attn {version}; draw it with that version")
            base = values.pop("base")
            return cls(
                base=Base(**base) if base else None,
                stages=tuple(Stage(**stage) for stage in values.pop("stages")),
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
        if file.suffix.lower() == ".png":
            with Image.open(file) as picture:
                text = getattr(picture, "text", {}).get(PNG_ENTRY)
            if text is None:
                raise ValueError(f"{file} has no text entry {PNG_ENTRY!r}; give a picture that clear_attn saved")
            return cls.from_json(text, str(file))
        return cls.from_json(file.read_text(encoding="utf-8"), str(file))
