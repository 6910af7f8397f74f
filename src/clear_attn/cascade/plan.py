"""Plans: everything an image is drawn from, as plain data that is saved with it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from clear_attn.cascade.stages import Base, Stage, read_stage
from clear_attn.methods.schedule import Schedule
from clear_attn.models._diffusers import replace_config
from clear_attn.patching.target import find_transformer
from clear_attn.utils.dtypes import dtype_name
from clear_attn.utils.json_records import Fields, parse_json, validate_record
from clear_attn.utils.versions import installed_versions
from clear_attn.weights.published import shared_name_of
from clear_attn.weights.sources import has_revision, shared_name

if TYPE_CHECKING:
    from clear_attn.cascade.work import PlanWork

FORMAT = 2
READABLE = (1, 2)
FIELDS: Fields = {
    "prompt": str,
    "height": int,
    "width": int,
    "base": dict | None,
    "stages": list,
    "seed": int,
    "window": int | None,
    "down_factor": int | None,
    "schedule": dict | None,
    "weights": str | None,
    "revision": str | None,
    "backend": str | None,
    "options": dict | None,
    "image": dict | None,
    "model": dict | None,
    "recording_bytes": int | None,
    "made_with": dict | None,
}
# The name of a PNG file's text entry.
PNG_ENTRY = "clear_attn"
# The fields that are arguments of `highres`; of them, those that `linearize` takes too.
ATTENTION = ("window", "down_factor", "schedule", "weights", "revision", "backend")
# What they are before `linearize` fills them in, if they are not given.
UNRESOLVED = {"window": None, "down_factor": None, "schedule": None, "weights": "auto", "backend": "auto"}
ARGUMENTS = ("prompt", "height", "width", "base", "stages", "seed", *ATTENTION)
# Names that `options` must not have: these, and the other arguments of `highres`.
RESERVED = {*ARGUMENTS, "preset", "pipe", "image", "resume", "token", "options", "self"}


def versions() -> dict[str, str]:
    """Return the versions of the packages that an image depends on."""
    return installed_versions("clear_attn", "diffusers", "torch")


def fingerprint(image: Image.Image) -> dict[str, Any]:
    """Return the hash of an image's pixels and its size."""
    pixels = image.convert("RGB").tobytes()
    return {"sha256": hashlib.sha256(pixels).hexdigest(), "height": image.height, "width": image.width}


def describe(pipe: Any) -> dict[str, Any]:
    """Return what an image depends on of a pipeline, except for its weights."""
    transformer, _ = find_transformer(pipe)
    scheduler = copy.copy(pipe.scheduler)
    replace_config(scheduler, scheduler.config)  # to_json_string() writes the version of diffusers into it
    schedule = json.loads(scheduler.to_json_string())
    return {
        "pipeline": type(pipe).__name__,
        "name": shared_name_of(pipe, transformer),
        "dtype": dtype_name(transformer.dtype),
        "scheduler": {
            "class": type(scheduler).__name__,
            "config": {name: value for name, value in schedule.items() if not name.startswith("_")},
        },
        "adapters": _active_adapters(pipe),
    }


def differences(planned: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Return in words how one pipeline differs from another, as `describe` describes them.

    Another version of diffusers may have more entries in a config, or fewer; what only one has is no difference.
    """
    for name in sorted(planned.keys() & present.keys()):
        before, now = planned[name], present[name]
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name} was {before!r} and is {now!r}"


def _active_adapters(pipe: Any) -> list[str]:
    try:
        return list(pipe.get_active_adapters())
    except (AttributeError, ValueError):  # the pipeline takes none, or peft is not installed
        return []


@dataclass(frozen=True)
class HighresPlan:
    """All settings of an image by `highres`. With the same software and device they give the same image.

    Attributes:
        prompt (`str`): the prompt.
        height, width (`int`): the size of the final image in pixels.
        base (`Base`, *optional*): settings of the base image, with size, steps and guidance resolved; None if an image
            was given.
        stages (tuple of `Stage`): settings of each stage, with size and NTK factor resolved.
        seed (`int`): the seed of the base image's noise; stage n uses seed + n.
        window, down_factor, schedule, weights, revision, backend: the arguments of `linearize`.
        options: further keywords of the pipelines' calls.
        image (*optional*): `sha256` of the pixels, `height` and `width` of the image that was given.
        model: `pipeline`, its class; `name`, its Hub id or the name of its folder; `dtype`; `scheduler`, its class
            and config; `adapters`, the names of active LoRAs.
        recording_bytes (`int`): a bound of the main memory that the recorded runs of `Stage.stepwise_guidance` and
            `Stage.continues` take at one time.
        made_with: versions of clear_attn, diffusers and torch.

    Examples:
        >>> plan = HighresPlan("a lighthouse", 2048, 2048, Base(), (Stage(),), 0, 8, 4, None)
        >>> HighresPlan.from_json(plan.to_json()) == plan
        True
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
    made_with: dict[str, str] = field(default_factory=versions)
    recording_bytes: int = 0

    @property
    def drawn(self) -> tuple[Base | Stage, ...]:
        """The settings of each image that is drawn: the base image, unless one was given, and each stage."""
        return (self.base, *self.stages) if self.base else self.stages

    def arguments(self) -> dict[str, Any]:
        """Return the keywords of `clear_attn.highres` that draw the image again; add the image if one was given."""
        return {**self.options, **{name: getattr(self, name) for name in ARGUMENTS}}

    def work(self, pipe: Any) -> PlanWork:
        """Count the FLOPs of attention of all runs, with `clear_attn.cost` for each step.

        Steps after a `continues` hands over are not counted. The base image and steps above a schedule's
        `dense_above_sigma` are dense.

        Args:
            pipe: the pipeline that draws the plan.

        Returns:
            `PlanWork`: FLOPs and steps of each run; `print` shows a table.

        Raises:
            TypeError, ValueError: the errors of `clear_attn.cost`; the pipeline is not supported.

        Examples:
            >>> from clear_attn import demo
            >>> from clear_attn.cascade import Base, Stage
            >>> base, stage = Base(128, 128, steps=20, guidance=3.5), Stage(256, 256)
            >>> plan = HighresPlan("a red circle", 256, 256, base, (stage,), 0, 8, 1, None)
            >>> [(run.name, run.steps) for run in plan.work(demo.pipeline()).runs]
            [('base image', 20), ('stage 1', 14)]
        """
        from clear_attn.cascade.work import work_of  # it imports this module

        return work_of(self, pipe)

    def without_paths(self) -> HighresPlan:
        """Return the plan with the names alone of local weights, for shared images: the paths are private."""
        return self if self.weights is None else dataclasses.replace(self, weights=shared_name(self.weights))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "this text") -> HighresPlan:
        """Read a plan that `to_json` wrote, also in format 1.

        Raises:
            ValueError: it is not a plan, or has another format; its options name an argument of `highres`.
        """
        try:
            values = validate_record(parse_json(text, "it"), {"format": int, "made_with": dict | None}, "it")
            if values.pop("format") not in READABLE:
                version = (values["made_with"] or {}).get("clear_attn", "another version")
                raise ValueError(f"its format was written by clear_attn {version}; draw it with that version")
            values = {name: value for name, value in validate_record(values, FIELDS, "it").items() if value is not None}
            reserved = sorted(name for name in values.get("options", ()) if name in RESERVED or "callback" in name)
            if reserved:
                raise ValueError(f"options must not have {reserved[0]!r}; set the plan's own field")
            base, schedule = values.pop("base", None), values.pop("schedule", None)
            absent = {"window": None, "down_factor": None, "weights": None}
            # Earlier versions recorded it where weights have none, which is an error today.
            if not has_revision(values.get("weights")):
                values.pop("revision", None)
            return cls(
                base=Base(**base) if base else None,
                stages=tuple(read_stage(stage) for stage in values.pop("stages")),
                schedule=None if schedule is None else Schedule.from_dict(schedule, "it"),
                **{**absent, **values},
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} is not a plan of a high-resolution image: {error}") from error

    @classmethod
    def load(cls, file: Path | str) -> HighresPlan:
        """Read the JSON file next to an image, or the PNG image itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it has no plan.
        """
        file = Path(file)
        if file.suffix.lower() != ".png":
            return cls.from_json(file.read_bytes(), str(file))
        text = _png_entry(file)
        if text is None:
            raise ValueError(f"{file} has no text entry {PNG_ENTRY!r}; give an image that clear_attn saved")
        return cls.from_json(text, str(file))


def comparable(plan: HighresPlan) -> HighresPlan:
    """Return a plan without what may change before it is resumed: versions, and the paths of local weights."""
    return dataclasses.replace(plan.without_paths(), made_with={})


def _png_entry(file: Path) -> str | None:
    """Read the text entry of an image of any size; PIL's own `open` has a limit."""
    try:
        with PngImageFile(file) as image:
            return image.text.get(PNG_ENTRY)
    except SyntaxError as error:
        raise ValueError(f"{file} is not a PNG image ({error}); give one that clear_attn saved") from None
