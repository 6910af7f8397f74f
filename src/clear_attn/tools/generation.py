"""What `clear-attn generate` does: resolve a plan, load the pipeline, draw, and save what is finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from PIL import Image, ImageOps

from clear_attn.cascade import HighresError, HighresInterrupted, HighresPlan, HighresResult, highres
from clear_attn.cascade.pipelines import find_cascade_target
from clear_attn.cascade.plan import describe, fingerprint
from clear_attn.cascade.planning import random_seed
from clear_attn.cascade.presets import default_preset
from clear_attn.cascade.result import delete_stages, has_plan, plan_file, stage_file
from clear_attn.models._diffusers import execution_device_of
from clear_attn.parallel import launch, parallelize
from clear_attn.patching.linearization import linearize
from clear_attn.tools import options
from clear_attn.utils.atomic import warn_if_unwritten
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


def differences(planned: dict[str, Any], present: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Return in words how one pipeline differs from another, as `describe` describes them."""
    for name in sorted(planned.keys() | present.keys()):
        before, now = planned.get(name), present.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name} was {before!r} and is {now!r}"


def draw(pipe: Any, arguments: dict[str, Any], output: Path, *, save_stages: bool) -> None:
    """Draw a large image and save it; under torchrun, with all processes.

    Each image is saved as soon as it is finished, to resume from after a kill. At the end the intermediate ones are
    deleted, unless they are wanted. After Ctrl-C or an error it saves the images that are finished, and ends the
    program; bugs keep their traceback. A file that cannot be written does not end the drawing; it is named at the end,
    which is an error.
    """
    if launch.launched():
        arguments = _parallelize(pipe, arguments)

    def keep(result: HighresResult) -> None:
        if launch.is_first() and not result.finished:
            with warn_if_unwritten(stage_file(output, len(result.images) - 1, result.image)):
                result.save(output)

    try:
        result = highres(pipe, **arguments, callback_on_stage_end=keep)
    except HighresInterrupted as stop:
        _save_finished("Interrupted", stop.result, output, save_stages=save_stages)
        raise typer.Exit(130) from None
    except HighresError as failure:
        cause = failure.__cause__ or failure
        _save_finished(f"{type(cause).__name__}: {cause}", failure.result, output, save_stages=save_stages)
        if not is_user_error(cause):
            raise cause from None
        if is_out_of_memory(cause):
            typer.echo("Less memory is needed for a smaller image, or on a GPU with --offload", err=True)
        raise typer.Exit(1) from None
    try:
        unwritten = _save(result, output, save_stages=save_stages) if launch.is_first() else []
    except KeyboardInterrupt:  # a large image takes seconds to write
        _save_finished("Interrupted", result, output, save_stages=save_stages)
        raise typer.Exit(130) from None
    if launch.launched():
        dist.destroy_process_group()
    if unwritten:
        typer.echo(f"{_listed(unwritten)} could not be written", err=True)
        raise typer.Exit(1)


def _save(result: HighresResult, output: Path, *, save_stages: bool) -> list[Path]:
    """Save a finished result, say where, and return the files that could not be written."""
    saved = [result.save(output, stages=save_stages)[-1], *_saved_plan(result, output)]
    typer.echo(f"Saved {_listed(saved)}, seed {result.plan.seed}")
    unwritten = [file for file in (output, plan_file(output)) if file not in saved]
    if not (save_stages or unwritten):
        delete_stages(result, output)
    return unwritten


def _saved_plan(result: HighresResult, output: Path) -> list[Path]:
    return [plan_file(output)] if has_plan(output, result.plan) else []


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
        raise options.refused("--resume", f"the pipeline is another, {changes}; give --model and --dtype as before")


def _save_finished(reason: str, result: HighresResult, output: Path, *, save_stages: bool) -> None:
    if launch.launched():
        launch.ignore_signals()
    if not launch.is_first():
        typer.echo(reason, err=True)
        return
    images = result.save(output) if result.images else []
    saved = [*images, *_saved_plan(result, output)]
    typer.echo(f"{reason}; saved {_listed(saved) or 'nothing'}", err=True)
    if images and not result.finished and output.suffix.lower() == ".png":
        given = "--model, --output and --init-image" if result.plan.image else "--model and --output"
        resume = ["--resume", *["--save-stages"] * save_stages, *["--overwrite"] * output.exists()]
        typer.echo(
            f"To go on, give {given} again, --device and --dtype as before, and {' and '.join(resume)}", err=True
        )
