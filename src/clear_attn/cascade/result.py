"""The result of `highres`: the images, and the plan they were drawn from."""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clear_attn.cascade.plan import PNG_ENTRY, HighresPlan
from clear_attn.utils.atomic import atomic_file, atomic_text
from clear_attn.utils.image_files import save_or_fall_back, try_write, validate_image_file
from clear_attn.utils.image_sizes import Size


@dataclass(frozen=True)
class HighresResult:
    """What `highres` returns.

    Attributes:
        images: RGB images: the first one, drawn or given, and that of each finished stage.
        plan (`HighresPlan`): what they were drawn from.

    Examples:
        >>> import clear_attn as clear
        >>> plan = HighresPlan("a lighthouse", 2048, 2048, clear.Base(), (clear.Stage(),), 0, 8, 4, None)
        >>> result = HighresResult([Image.new("RGB", (1024, 1024))], plan)
        >>> result.finished, result.image.size
        (False, (1024, 1024))
    """

    images: list[Image.Image]
    plan: HighresPlan

    @property
    def image(self) -> Image.Image:
        """The last image.

        Raises:
            ValueError: no image was finished.
        """
        if not self.images:
            raise ValueError("no image was finished, not even the first one; draw it again")
        return self.images[-1]

    @property
    def finished(self) -> bool:
        """Whether all stages were drawn."""
        return len(self.images) == 1 + len(self.plan.stages)

    def save(self, file: Path | str, *, stages: bool = False) -> list[Path]:
        """Save the last image, with the plan in it (PNG only) and next to it (`out.png.json` for `out.png`).

        Of an unfinished result, save every image, with its number and size in its name. An image that cannot be written
        goes to a file in the system's temporary folder, with a warning that names it.

        Args:
            file: where the last image goes, a `.png`, `.jpg`, `.webp`, `.tif` or `.bmp` file. The plan in an image has
                the names of local weights without their folders.
            stages: also save the images before the last one, with number and size in their names.

        Returns:
            The files of the images, the last image's last.

        Raises:
            ValueError: no image was finished, or the file's format does not suit the image.
            FileExistsError: the plan would overwrite a JSON file that is not a plan.
            OSError: neither the files nor a fallback file can be written.
        """
        file, last = Path(file), self.image
        validate_image_file(file, (last.height, last.width))
        numbered = self.images if not self.finished else self.images[:-1] if stages else []
        images = {stage_file(file, number, image): image for number, image in enumerate(numbered)}
        if self.finished:
            images[file] = last
        _validate_plan_file(plan_file(file))
        written = [
            save_or_fall_back(functools.partial(save_with_plan, image, plan=self.plan), path)
            for path, image in images.items()
        ]
        try:
            save_plan(self.plan, file)
        except OSError as error:
            warnings.warn(f"{plan_file(file)} could not be written ({error}); the plan is in this result", stacklevel=2)
        return written


def stage_file(file: Path, number: int, image: Image.Image) -> Path:
    """Return the file of an intermediate image: out-0-1024x768.png for the first of out.png, height before width."""
    return file.with_name(f"{file.stem}-{number}-{image.height}x{image.width}{file.suffix}")


def stage_files(file: Path) -> list[Path]:
    """Return the files that exist under names of an image's intermediate images."""
    name = re.compile(rf"{re.escape(file.stem)}-\d+-\d+x\d+{re.escape(file.suffix)}")
    return sorted(each for each in file.resolve().parent.iterdir() if name.fullmatch(each.name))


def plan_file(file: Path) -> Path:
    """Return the file of an image's plan: out.png.json for out.png."""
    return file.with_name(f"{file.name}.json")


def save_plan(plan: HighresPlan, file: Path) -> None:
    """Save a plan next to the image that is drawn from it.

    Raises:
        FileExistsError: there is a file of the plan's name that is not a plan.
    """
    _validate_plan_file(plan_file(file))
    atomic_text(plan_file(file), plan.to_json())


def _validate_plan_file(file: Path) -> None:
    if file.exists():
        try:
            HighresPlan.load(file)
        except (OSError, ValueError):
            raise FileExistsError(f"{file} is not a plan and would be overwritten; give another file") from None


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
    # The names of intermediate images are the longest.
    longest = file.with_name(f"{file.stem}-99-{size[0]}x{size[1]}{file.suffix}")
    for each in (file, plan_file(file), longest):
        try_write(each)
    _validate_plan_file(plan_file(file))


class HighresInterrupted(KeyboardInterrupt):
    """Ctrl-C inside `highres`; the pipeline is as it was.

    Attributes:
        result (`HighresResult`): the images that were finished.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> def press(number, image, plan):
        ...     raise KeyboardInterrupt
        >>> base = clear.Base(height=64, width=64, steps=1)
        >>> settings = {"height": 128, "width": 128, "weights": None, "callback_on_stage_end": press}
        >>> try:
        ...     clear.highres(demo.pipeline(), "a cross", base=base, **settings)
        ... except clear.HighresInterrupted as interrupted:
        ...     [image.size for image in interrupted.result.images]
        [(64, 64)]
    """

    def __init__(self, result: HighresResult) -> None:
        super().__init__(f"interrupted after {len(result.images)} of {1 + len(result.plan.stages)} images")
        self.result = result


class HighresError(RuntimeError):
    """An error while `highres` drew, which is its `__cause__`; the pipeline is as it was.

    Attributes:
        result (`HighresResult`): the images that were finished.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> def fail(number, image, plan):
        ...     raise OSError("no space left")
        >>> base = clear.Base(height=64, width=64, steps=1)
        >>> settings = {"height": 128, "width": 128, "weights": None, "callback_on_stage_end": fail}
        >>> try:
        ...     clear.highres(demo.pipeline(), "a cross", base=base, **settings)
        ... except clear.HighresError as error:
        ...     print(error)
        OSError: no space left; 1 of 2 images are finished, in this error's result
    """

    def __init__(self, result: HighresResult, cause: Exception) -> None:
        super().__init__(
            f"{type(cause).__name__}: {cause}; {len(result.images)} of {1 + len(result.plan.stages)} images are "
            "finished, in this error's result"
        )
        self.result = result
