"""A whole run: from a model's name and images to distilled weights."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration
from tqdm.auto import tqdm

from clear_attn.distill import checkpoint
from clear_attn.distill.data import prepare
from clear_attn.distill.optimizers import check_optimizer
from clear_attn.distill.settings import Settings
from clear_attn.distill.trainer import RUN, Run, shared
from clear_attn.distill.validation import Validation
from clear_attn.patching.saving import save_values
from clear_attn.utils.atomic import check_folder

# Types of settings that every tracker takes.
LOGGABLE = (bool, int, float, str)


def train(settings: Settings) -> Path:
    """Distil a model, and save the result as `clear_attn.save_pretrained` does.

    Args:
        settings (`Settings`): of the run.

    Returns:
        The folder of the result, `settings.output_dir`.

    Raises:
        ValueError: settings out of range; images without captions; a cache or a checkpoint of something else, or one
            that is not complete.
        TypeError: a model that cannot be linearized or distilled.
        FileExistsError: the folder has another run, or later checkpoints than the one to continue from.
        FileNotFoundError: there is no such checkpoint, or no such file of prompts.
        NotADirectoryError: a folder is a file.
        ImportError: a setting needs a library that is not installed.
        FloatingPointError: a loss, gradient or weight is not finite; nothing was overwritten.
    """
    settings.check()
    folder = check_folder(settings.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=_precision(settings),
        log_with=_tracker(settings.report_to),
        project_config=ProjectConfiguration(settings.output_dir, str(folder / settings.logging_dir)),
    )
    check_optimizer(settings, accelerator)
    with checkpoint.locked(folder) if accelerator.is_main_process else contextlib.nullcontext():
        _train(settings, folder, accelerator)
    return folder


def _train(settings: Settings, folder: Path, accelerator: Accelerator) -> None:
    resumed = checkpoint.find(folder, settings.resume_from_checkpoint)
    if resumed:
        checkpoint.check_settings(resumed, shared(settings, accelerator))
        checkpoint.read(resumed, RUN)  # before anything takes time
    images = prepare.examples(settings)
    pipe = prepare.load(settings, accelerator)
    data = prepare.data(settings, accelerator, pipe, images)
    validation = Validation(settings, accelerator, pipe)
    prepare.drop_text_encoders(pipe)
    run = Run(settings, accelerator, pipe, data)
    if resumed:
        run.restore(resumed)
    loggable = {name: value for name, value in shared(settings, accelerator).items() if isinstance(value, LOGGABLE)}
    accelerator.init_trackers("distill", config=loggable)
    _run_steps(run, settings, accelerator, validation)
    values = run.result()
    if accelerator.is_main_process:
        save_values(pipe, settings.attention, values, folder)
    accelerator.end_training()


def _run_steps(run: Run, settings: Settings, accelerator: Accelerator, validation: Validation) -> None:
    last = settings.max_train_steps
    hidden = not accelerator.is_local_main_process
    with tqdm(initial=run.step, total=last, desc="distilling", disable=hidden) as progress:
        for values in run.steps():
            progress.update()
            progress.set_postfix(loss=f"{values['total']:.4f}")
            accelerator.log(values, step=run.step)
            if run.step % settings.checkpointing_steps == 0 or run.step == last:
                run.save()
            if run.step % settings.validation_steps == 0 or run.step == last:
                with run.averaged(), run.autocast():
                    validation.draw(run.step)


def _precision(settings: Settings) -> str | None:
    """Return what the settings ask for, else bf16 on a GPU, or None if accelerate is configured."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    default = "bf16" if torch.cuda.is_available() and not configured else None
    return settings.mixed_precision or default


def _tracker(name: str) -> str | None:
    """Return the tracker to report to; accelerate silently leaves out one that is not installed."""
    if name in ("none", "all") or name in [tracker.value for tracker in get_available_trackers()]:
        return None if name == "none" else name
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise ValueError(f"report_to must be one of {', '.join(known)}, all, none; got {name!r}")
    raise ImportError(f"report_to={name!r} needs {name}: pip install {name}, or give report_to='none'")
