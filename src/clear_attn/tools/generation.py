"""What `clear-attn generate` does: resolve a plan, load the pipeline, draw, and save what is finished."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from PIL import Image, ImageOps

from clear_attn.cascade import HighresError, HighresInterrupted, HighresPlan, HighresResult, highres
from clear_attn.cascade.large_images import ResumeError
from clear_attn.cascade.pipelines import find_cascade_target
from clear_attn.cascade.plan import describe, differences, fingerprint, versions
from clear_attn.cascade.planning import random_seed
from clear_attn.cascade.presets import default_preset
from clear_attn.cascade.saved_files import has_plan, plan_file, stage_file, stage_files, stages_of, unfinished_stages
from clear_attn.models._diffusers import execution_device_of
from clear_attn.parallel import launch, parallelize
from clear_attn.patching.linearization import linearize
from clear_attn.tools import options
from clear_attn.utils.user_errors import is_out_of_memory, is_user_error


def open_image(file: Path) -> Image.Image:
    """Return an image as viewers show it."""
    with Image.open(file) as image:
        # Cameras save how they were held, not a turned image.
        return ImageOps.exif_transpose(image).convert("RGB")


def load_plan(file: Path, image: Image.Image | None) -> HighresPlan:
    """Load a plan, and check that it starts from an image.

    Raises:
        ValueError: it starts from another image, or from none.
    """
    plan, given = HighresPlan.load(file), fingerprint(image) if image else None
    if given != plan.image:
        wanted = f"starts from an image {plan.image}" if plan.image else "starts from no image"
        raise ValueError(f"{file} {wanted}, and --init-image is {given or 'not given'}")
    return plan


def select_rank_device(name: str | None) -> torch.device:
    """Return the device of a name; under torchrun each process has a GPU of its own, or all take the CPU."""
    if not launch.launched() or name == "cpu":
        return options.select_device(name)
    if name is not None:
        raise options.refused("--device", "under torchrun each process takes its own GPU; leave it out")
    return launch.own_device()


class Output(NamedTuple):
    """Where a run saves its images.

    Attributes:
        file: that of the large image.
        save_stages: whether the images of stages are wanted, too.
        before: files with names of stage images that were there before the run.
        unfinished: those of them that runs saved which did not finish their image.
    """

    file: Path
    save_stages: bool
    before: set[Path]
    unfinished: set[Path]

    @classmethod
    def find(cls, file: Path, *, save_stages: bool) -> Output:
        """Return where to save, with what is there."""
        return cls(file, save_stages, set(stage_files(file)), set(unfinished_stages(file)))

    @property
    def is_resumable(self) -> bool:
        """Whether a run can be resumed from its files."""
        return self.file.suffix.lower() == ".png"

    def keep(self, result: HighresResult) -> None:
        """Save what is finished of an unfinished result, to resume from after a kill."""
        if launch.is_first() and not result.finished and (self.is_resumable or self.save_stages):
            # The weights may have changed since another run of this plan drew its images.
            for file in {*stages_of(self.file, result.plan)} - self._stages(result.images):
                file.unlink()
            result.save_progress(self.file)

    def save(self, result: HighresResult) -> list[Path]:
        """Save a result, delete the images of stages that are not wanted, and return the other files that are saved."""
        images = result.save(self.file, stages=self.save_stages) if result.images or self.is_resumable else []
        plan = [plan_file(self.file)] if has_plan(self.file, result.plan) else []
        saved = [*(images[-1:] if result.finished else images), *plan]
        if result.finished and not self.unwritten(saved):
            self._delete_stages(result)
        return saved

    def unwritten(self, saved: Sequence[Path]) -> list[Path]:
        """Return the files of a finished image that are not among those saved."""
        return [file for file in (self.file, plan_file(self.file)) if file not in saved]

    def can_resume(self, result: HighresResult, saved: Sequence[Path]) -> bool:
        """Return whether a run can be resumed from the images of an unfinished result, as its files are saved."""
        images = self._stages(result.images)
        return self.is_resumable and bool(images) and {*images, plan_file(self.file)} <= set(saved)

    def _stages(self, images: Sequence[Image.Image]) -> set[Path]:
        """Return the files of intermediate images."""
        return {stage_file(self.file, *each) for each in enumerate(images)}

    def _delete_stages(self, result: HighresResult) -> None:
        """Delete the images of stages that this run saved or unfinished ones left; files of others stay."""
        own = self._stages(result.images[:-1])
        for file in (self.unfinished | own) - (own if self.save_stages else self.before - self.unfinished):
            file.unlink(missing_ok=True)


def draw(pipe: Any, arguments: dict[str, Any], output: Path, *, save_stages: bool) -> None:
    """Draw a large image and save it; under torchrun, with all processes.

    The plan is saved before the first step and each image as soon as it is finished, to resume from after a kill. At
    the end the intermediate images are deleted, unless they are wanted. After Ctrl-C or an error it saves the images
    that are finished, and ends the program; bugs keep their traceback. A file that cannot be written does not end the
    drawing; it is named at the end, which is an error.
    """
    if launch.launched():
        arguments = _parallelize(pipe, arguments)
    place = Output.find(output, save_stages=save_stages)
    try:
        with refusing_resume():
            result = highres(pipe, **arguments, callback_on_start=place.keep, callback_on_stage_end=place.keep)
    except HighresInterrupted as stop:
        _save_finished("Interrupted", stop.result, place)
        raise typer.Exit(130) from None
    except HighresError as failure:
        cause = failure.__cause__ or failure
        _save_finished(f"{type(cause).__name__}: {cause}", failure.result, place)
        if not is_user_error(cause):
            raise cause from None
        if is_out_of_memory(cause):
            typer.echo("Less memory is needed for a smaller image, or on a GPU with --offload", err=True)
        raise typer.Exit(1) from None
    unwritten: list[Path] = []
    try:
        if launch.is_first():
            saved = place.save(result)
            typer.echo(f"Saved {_listed(saved)}, seed {result.plan.seed}")
            unwritten = place.unwritten(saved)
    except KeyboardInterrupt:  # a large image takes seconds to write
        _save_finished("Interrupted", result, place)
        raise typer.Exit(130) from None
    if launch.launched():
        dist.destroy_process_group()
    if unwritten:
        typer.echo(f"{_listed(unwritten)} could not be written", err=True)
        raise typer.Exit(1)


def _listed(files: Sequence[Path]) -> str:
    return " and ".join(map(str, files))


def _parallelize(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Linearize a pipeline and split it over the ranks; return the arguments with one seed for all ranks."""
    launch.join()
    launch.interrupt_on_sigterm()
    names = ("window", "down_factor", "weights", "revision")
    linearize(pipe, **{name: arguments[name] for name in names if name in arguments})
    parallelize(pipe)
    if not launch.is_first():
        pipe.set_progress_bar_config(disable=True)
    if arguments.get("seed") is not None:
        return arguments
    seed = random_seed(execution_device_of(pipe))
    dist.broadcast(seed, src=0)
    return {**arguments, "seed": int(seed)}


def preset_of(pipe: Any) -> str:
    """Return the name of the preset that a pipeline's model draws with by default."""
    return default_preset(find_cascade_target(pipe).patched)


def warn_of_differences(plan: HighresPlan, pipe: Any) -> None:
    """Warn if a pipeline is not the one of a plan."""
    if changes := "; ".join(differences(plan.model, describe(pipe))):
        typer.echo(f"Warning: the image will differ, as the pipeline does: {changes}", err=True)


def refuse_differences(plan: HighresPlan, pipe: Any) -> None:
    """Raise BadParameter if a pipeline is not the one of a plan that is resumed."""
    if changes := "; ".join(differences(plan.model, describe(pipe))):
        other = ", ".join(differences(plan.made_with, versions()))
        install = f", or install the versions of before: {other}" if other else ""
        raise options.refused(
            "--resume", f"the pipeline is another, {changes}; give --model and --dtype as before{install}"
        )


@contextlib.contextmanager
def refusing_resume() -> Iterator[None]:
    """Report that an unfinished run cannot be resumed, as an error for --resume."""
    try:
        yield
    except ResumeError as error:
        remedy = "give --model, --dtype, --weights and --init-image as before, or draw again with --overwrite instead"
        raise options.refused("--resume", f"the unfinished run {error.reason}; {remedy}") from error


def refuse_as_first_image(init_image: Path, output: Path) -> None:
    """Raise BadParameter if an image to start from would be replaced by the image of a stage, and deleted.

    Raises:
        BadParameter: it has the name of one.
    """
    if any(init_image.samefile(each) for each in stage_files(output)):
        raise options.refused(
            "--init-image",
            f"{init_image} has the name of an image of a stage of {output}, which are replaced and deleted; give a "
            "copy of another name",
        )


def _save_finished(reason: str, result: HighresResult, place: Output) -> None:
    if launch.launched():
        launch.ignore_signals()
    if not launch.is_first():
        typer.echo(reason, err=True)
        return
    saved = place.save(result)
    typer.echo(f"{reason}; saved {_listed(saved) or 'nothing'}", err=True)
    if not result.finished and place.can_resume(result, saved):
        given = "--model, --output and --init-image" if result.plan.image else "--model and --output"
        resume = ["--resume", *["--save-stages"] * place.save_stages, *["--overwrite"] * place.file.exists()]
        typer.echo(
            f"To go on, give {given} again, --device and --dtype as before, and {' and '.join(resume)}", err=True
        )
