"""What `highres` gives: the images, and the plan that they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clear_attn.cascade.plan import PNG_ENTRY, HighresPlan
from clear_attn.utils.atomic import atomic_file, atomic_text


@dataclass(frozen=True)
class HighresResult:
    """Of `highres`.

    Attributes:
        images: the first image, drawn or given, and that of each finished stage, RGB.
        plan (`HighresPlan`): what they were made from.
    """

    images: list[Image.Image]
    plan: HighresPlan

    @property
    def image(self) -> Image.Image:
        """The last one.

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
        """Saves the last image, with the plan in it (PNG) and beside it (the same name, ending in .json).

        Of an unfinished result every image, each with its number and size in its name.

        Args:
            file: where it goes; other kinds of picture than PNG have the plan only beside them. In the picture, weights
                on this machine are named without the folder that they lie in.
            stages: save the images before it too, each with its number and size in its name.

        Returns:
            The pictures' files.

        Raises:
            ValueError: no image was finished.
        """
        file, last = Path(file), self.image
        numbered = self.images if not self.finished else self.images[:-1] if stages else []
        files = {stage_file(file, number, image): image for number, image in enumerate(numbered)}
        if self.finished:
            files[file] = last
        save_plan(self.plan, file)
        for path, image in files.items():
            save_with_plan(image, path, self.plan)
        return list(files)


def stage_file(file: Path, number: int, image: Image.Image) -> Path:
    """Where an image on the way goes: out.png's first one to out-0-1024x1024.png, height before width."""
    return file.with_name(f"{file.stem}-{number}-{image.height}x{image.width}{file.suffix}")


def save_plan(plan: HighresPlan, file: Path) -> None:
    """Beside a picture, in a file of the same name that ends in .json."""
    atomic_text(file.with_suffix(".json"), plan.to_json())


def save_with_plan(image: Image.Image, file: Path, plan: HighresPlan) -> None:
    options: dict[str, Any] = {}
    if file.suffix.lower() == ".png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(PNG_ENTRY, plan.without_places().to_json())
    with atomic_file(file) as unfinished:
        image.save(unfinished, **options)


class HighresInterrupted(KeyboardInterrupt):
    """Ctrl-C inside `highres`; the pipeline is as it was.

    Attributes:
        result (`HighresResult`): what was finished by then.
    """

    def __init__(self, result: HighresResult) -> None:
        super().__init__(f"interrupted after {len(result.images)} of {1 + len(result.plan.stages)} images")
        self.result = result


class HighresError(RuntimeError):
    """An error while `highres` drew, which is this one's `__cause__`; the pipeline is as it was.

    Attributes:
        result (`HighresResult`): what was finished by then.
    """

    def __init__(self, result: HighresResult, cause: Exception) -> None:
        super().__init__(
            f"{type(cause).__name__}: {cause}; {len(result.images)} of {1 + len(result.plan.stages)} images are "
            "finished, in this error's result"
        )
        self.result = result
