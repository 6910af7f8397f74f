"""The result of `highres`: the images, and the plan they were drawn from."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from clear_attn.cascade.plan import HighresPlan, comparable
from clear_attn.cascade.recording import Recording, load_recording, save_recording
from clear_attn.cascade.saved_files import (
    files_of_stages,
    is_of,
    plan_file,
    plan_in,
    run_file,
    save_plan,
    save_with_plan,
    stage_file,
    validate_plan_file,
)
from clear_attn.utils.atomic import warn_if_unwritten
from clear_attn.utils.image_files import save_or_fall_back, validate_image_file


@dataclass(frozen=True)
class HighresResult:
    """What `highres` returns.

    Attributes:
        images: RGB images: the first one, drawn or given, and that of each finished stage.
        plan (`HighresPlan`): what they were drawn from.
        runs: by the number of the last image, the record of its run, if the next stage needs it; for
            `highres(..., resume=result)`.

    Examples:
        >>> import clear_attn as clear
        >>> plan = HighresPlan("a lighthouse", 2048, 2048, clear.Base(), (clear.Stage(),), 0, 8, 4, None)
        >>> result = HighresResult([Image.new("RGB", (1024, 1024))], plan)
        >>> result.finished, result.image.size
        (False, (1024, 1024))
    """

    images: list[Image.Image]
    plan: HighresPlan
    runs: dict[int, Recording] = field(default_factory=dict, repr=False, compare=False)

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

    def keep(self, image: Image.Image, recording: Recording | None) -> None:
        """Add a finished image; the record of its run replaces that of the run before."""
        self.runs.clear()
        if recording:
            self.runs[len(self.images)] = recording
        self.images.append(image)

    @classmethod
    def load(cls, file: Path | str) -> HighresResult:
        """Read the unfinished result that `save` wrote under the name of an image, to resume it.

        Args:
            file: the name that was given to `save` or `generate`; its plan, images and record are next to it.

        Returns:
            What is there, even if that is the plan alone: of a process that was killed before its first image.

        Raises:
            FileNotFoundError: there is no plan.
            ValueError: the plan or the record cannot be read; the images are not PNG files, which alone have the plan;
                an image that is not from `highres` has the name of one of this plan.

        Examples:
            >>> import tempfile
            >>> import clear_attn as clear
            >>> stages = (clear.Stage(128, 128),)
            >>> plan = HighresPlan("a lighthouse", 128, 128, clear.Base(64, 64), stages, 0, 8, 4, None)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = Path(folder) / "out.png"
            ...     _ = HighresResult([Image.new("RGB", (64, 64))], plan).save(file)
            ...     len(HighresResult.load(file).images)
            1
        """
        file = Path(file)
        if file.suffix.lower() != ".png":
            raise ValueError(
                f"{file} cannot be resumed: only .png files keep exact pixels and the plan that they are of; draw it "
                "again, to a .png file"
            )
        if not plan_file(file).exists():
            raise FileNotFoundError(f"there is no {plan_file(file)} to resume from; draw the image")
        plan = HighresPlan.load(plan_file(file))
        files = files_of_stages(file, plan)
        # Images of another plan may have been left under these names.
        are_there = [is_of(each, plan) for each in files]
        found = list(itertools.compress(files, itertools.accumulate(are_there, min)))
        runs = _load_run(run_file(file), plan)
        count = _resumable(len(found), plan, runs)
        return cls(
            [_open(each) for each in found[:count]],
            plan,
            {number: run for number, run in runs.items() if number == count - 1},
        )

    def save(self, file: Path | str, *, stages: bool = False) -> list[Path]:
        """Save the last image, with the plan in it (PNG only) and next to it (`out.png.json` for `out.png`).

        Of an unfinished result, save every image, with its number and size in its name, and the record of the last run
        if the next stage needs it (`out.png.run.safetensors`); `load` reads them. A PNG file that has the same image
        and plan already is left. An image that cannot be written goes to a file in the system's temporary folder, with
        a warning that names it.

        Args:
            file: where the last image goes, a `.png`, `.jpg`, `.webp`, `.tif` or `.bmp` file. The plan in an image has
                the names of local weights without their folders.
            stages: also save the images before the last one, with number and size in their names.

        Returns:
            The files of the images, the last image's last; none if no image is finished.

        Raises:
            ValueError: the file's format does not suit the image.
            FileExistsError: the plan would overwrite a JSON file that is not a plan.
            OSError: neither the files nor a fallback file can be written.
        """
        file = Path(file)
        validate_image_file(file, (self.image.height, self.image.width) if self.images else None)
        validate_plan_file(plan_file(file))
        return self._save(file, save_or_fall_back, stages=stages)

    def save_progress(self, file: Path | str) -> None:
        """Save an unfinished result as `save` does, but only warn of what cannot be written: more images follow."""
        self._save(Path(file), _save_or_warn, stages=False)

    def _save(self, file: Path, write: Callable[[Callable[[Path], None], Path], Path], *, stages: bool) -> list[Path]:
        numbered = self.images if not self.finished else self.images[:-1] if stages else []
        images = {stage_file(file, number, image): image for number, image in enumerate(numbered)}
        if self.finished:
            images[file] = self.image
        # A killed process leaves a plan without images, or images without the record, and `load` copes with both.
        with warn_if_unwritten(plan_file(file)):
            save_plan(self.plan, file)
        written = [
            path
            if self._is_saved(image, path)
            else write(functools.partial(save_with_plan, image, plan=self.plan), path)
            for path, image in images.items()
        ]
        with warn_if_unwritten(run_file(file)):
            self._save_run(file)
        return written

    def _is_saved(self, image: Image.Image, file: Path) -> bool:
        saved = plan_in(file)
        return (
            saved is not None
            and comparable(saved) == comparable(self.plan)
            and _open(file).tobytes() == image.convert("RGB").tobytes()
        )

    def _save_run(self, file: Path) -> None:
        recording = None if self.finished else self.runs.get(len(self.images) - 1)
        if recording:
            about = {"image": str(len(self.images) - 1), "plan": _hash(self.plan)}
            save_recording(recording, run_file(file), about)
        else:
            run_file(file).unlink(missing_ok=True)


def _save_or_warn(save: Callable[[Path], None], file: Path) -> Path:
    with warn_if_unwritten(file):
        save(file)
    return file


def _open(file: Path) -> Image.Image:
    with PngImageFile(file) as image:
        return image.convert("RGB")


def _hash(plan: HighresPlan) -> str:
    return hashlib.sha256(comparable(plan).to_json().encode()).hexdigest()


def _resumable(found: int, plan: HighresPlan, runs: Container[int]) -> int:
    """Return how many of the images can be resumed from: the stage after them has the record that it needs."""
    counts = range(1, found + 1)
    return max((n for n in counts if n - 1 in runs or not plan.stages[n - 1].needs_recording), default=0)


def _load_run(file: Path, plan: HighresPlan) -> dict[int, Recording]:
    """Return the record of a run by the number of its image, if there is one of this plan."""
    if not file.exists():
        return {}
    recording, about = load_recording(file)
    return {int(about["image"]): recording} if about.get("plan") == _hash(plan) else {}


class HighresInterrupted(KeyboardInterrupt):
    """Ctrl-C inside `highres`; the pipeline is as it was.

    Attributes:
        result (`HighresResult`): the images that were finished.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> def press(result):
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
        >>> def fail(result):
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
