"""The files that a result of `highres` is saved as: their names, and what is in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clear_attn.cascade.plan import PNG_ENTRY, HighresPlan, comparable
from clear_attn.utils.atomic import atomic_file, atomic_text
from clear_attn.utils.image_files import try_write, validate_image_file
from clear_attn.utils.image_sizes import Size
from clear_attn.utils.json_records import parse_json


def stage_file(file: Path, number: int, image: Image.Image) -> Path:
    """Return the file of an intermediate image: out-0-1024x768.png for the first of out.png, height before width."""
    return file.with_name(stage_name(file, number, (image.height, image.width)))


def stage_name(file: Path, number: int, size: Size) -> str:
    """Return the name of an intermediate image's file."""
    return f"{file.stem}-{number}-{size[0]}x{size[1]}{file.suffix}"


def plan_in(file: Path) -> HighresPlan | None:
    """Return the plan in a PNG image, or None if there is none that can be read."""
    try:
        return HighresPlan.load(file) if file.suffix.lower() == ".png" else None
    except (OSError, ValueError):
        return None


def is_of(file: Path, plan: HighresPlan) -> bool:
    """Return whether an image exists and was drawn from a plan.

    Raises:
        ValueError: it exists and has no plan.
    """
    if not file.exists():
        return False
    saved = plan_in(file)
    if saved is None:
        raise ValueError(f"{file} is not an image of highres, and drawing on would overwrite it; move it away")
    return comparable(saved) == comparable(plan)


def run_file(file: Path) -> Path:
    """Return the file of the record of an unfinished result's last run: out.png.run.safetensors for out.png."""
    return file.with_name(f"{file.name}.run.safetensors")


def stage_files(file: Path) -> list[Path]:
    """Return the files that exist under names of an image's intermediate images."""
    name = re.compile(rf"{re.escape(file.stem)}-\d+-\d+x\d+{re.escape(file.suffix)}")
    return sorted(each for each in file.parent.iterdir() if name.fullmatch(each.name))


def unfinished_stages(file: Path) -> list[Path]:
    """Return the intermediate images of the plan next to an image that was not drawn to its end."""
    try:
        plan = HighresPlan.load(plan_file(file))
    except (OSError, ValueError):
        return []
    finished = plan_in(file)
    return [] if finished and comparable(finished) == comparable(plan) else stages_of(file, plan)


def stages_of(file: Path, plan: HighresPlan) -> list[Path]:
    """Return the intermediate images next to an image that were drawn from a plan."""
    drawn = ((each, plan_in(each)) for each in files_of_stages(file, plan) if each.exists())
    return [each for each, own in drawn if own and comparable(own) == comparable(plan)]


def files_of_stages(file: Path, plan: HighresPlan) -> list[Path]:
    """Return the files in which the intermediate images of a plan are saved, whether they exist or not."""
    given = [(plan.image["height"], plan.image["width"])] if plan.image else []
    sizes = [*given, *(each.size for each in plan.drawn[:-1] if each.height is not None)]
    return [file.with_name(stage_name(file, *each)) for each in enumerate(sizes)]


def plan_file(file: Path) -> Path:
    """Return the file of an image's plan: out.png.json for out.png."""
    return file.with_name(f"{file.name}.json")


def save_plan(plan: HighresPlan, file: Path) -> None:
    """Save a plan next to the image that is drawn from it.

    Raises:
        FileExistsError: there is a file of the plan's name that is not a plan.
    """
    validate_plan_file(plan_file(file))
    if not has_plan(file, plan):
        atomic_text(plan_file(file), plan.to_json())


def has_plan(file: Path, plan: HighresPlan) -> bool:
    """Return whether a plan is saved next to an image."""
    saved = plan_file(file)
    return saved.is_file() and saved.read_bytes() == plan.to_json().encode()


def validate_plan_file(file: Path) -> None:
    """Raise FileExistsError for a file that a plan would overwrite and that is not a plan, of any version."""
    if file.exists() and not _is_plan(file):
        raise FileExistsError(f"{file} is not a plan and would be overwritten; give another file")


def _is_plan(file: Path) -> bool:
    try:
        return {"format", "prompt", "stages"} <= parse_json(file.read_bytes(), "it").keys()
    except (OSError, ValueError, AttributeError):
        return False


def save_with_plan(image: Image.Image, file: Path, plan: HighresPlan) -> None:
    """Save an image, with the plan in it if it is a PNG file."""
    options: dict[str, Any] = {}
    if file.suffix.lower() == ".png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(PNG_ENTRY, plan.without_paths().to_json())
    with atomic_file(file) as unfinished:
        image.save(unfinished, **options)


def validate_output(file: Path, size: Size) -> None:
    """Check before drawing that an image, its plan and intermediate images can be saved, by writing trial files.

    Args:
        file: where the image goes.
        size: height and width of the image in pixels.

    Raises:
        ValueError: the file's format is unknown or cannot hold the image.
        FileExistsError: the plan would overwrite a file that is not a plan.
        OSError: the folder does not exist, or nothing can be written there under such a name.
    """
    validate_image_file(file, size)
    if not file.resolve().parent.is_dir():
        raise FileNotFoundError(f"no such directory: {file.resolve().parent}; create it, or give another file")
    longest = file.with_name(f"{file.stem}-99-{size[0]}x{size[1]}{file.suffix}")
    for each in (file, plan_file(file), run_file(file), longest):
        try_write(each)
    validate_plan_file(plan_file(file))
