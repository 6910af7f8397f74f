"""A whole training run, from a model's name and images to distilled weights."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration
from tqdm.auto import tqdm

from clear_attn.distill import checkpoint
from clear_attn.distill.data import prepare
from clear_attn.distill.optimizers import check_optimizer
from clear_attn.distill.settings import WEIGHTS, Settings
from clear_attn.distill.trainer import RUN, Run, shared
from clear_attn.distill.validation import Validation
from clear_attn.patching.saving import save_values
from clear_attn.utils.atomic import check_folder
from clear_attn.weights.sources import shared_name

# Types of settings that every tracker supports.
LOGGABLE = (bool, int, float, str)


def train(settings: Settings) -> Path:
    """Distill a model, and save the result in the format of `clear_attn.save_pretrained`.

    Args:
        settings (`Settings`): the settings of the run.

    Returns:
        The folder of the result, `settings.output_dir`.

    Raises:
        ValueError: a setting is out of range, an image has no caption, or a cache or checkpoint is incomplete or was
            made with other settings.
        TypeError: the model cannot be linearized or distilled.
        FileExistsError: the folder has another run, or later checkpoints than the one to resume from.
        FileNotFoundError: the checkpoint or the file of prompts does not exist.
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
        checkpoint.read(resumed, RUN)  # find an incomplete checkpoint before the slow steps
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
        save_values(pipe, settings.attention, values, folder, training=_facts(settings, accelerator, pipe, len(images)))
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


def _facts(settings: Settings, accelerator: Accelerator, pipe: Any, images: int) -> dict[str, Any]:
    """Return what `clear_config.json` says about a finished run."""
    given = settings.dataset_name or settings.train_data_dir
    return {
        "steps": settings.max_train_steps,
        "images_per_step": (
            settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
        ),
        "resolution": prepare.resolution(settings, pipe),
        "images": images,
        "data": "images of the model" if settings.generate else shared_name(str(given)),
        "loss_weights": {name.removesuffix("_weight"): getattr(settings, name) for name in WEIGHTS},
        "student": f"lora, rank {settings.rank}" if settings.student == "lora" else settings.student,
        "optimizer": settings.optimizer,
        "learning_rate": settings.rate,
        "use_ema": settings.use_ema,
        "mixed_precision": accelerator.mixed_precision,
        "seed": settings.seed,
    }


def _precision(settings: Settings) -> str | None:
    """Return the mixed precision of the settings, else None if accelerate is configured, else bf16 on a GPU."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    default = "bf16" if torch.cuda.is_available() and not configured else None
    return settings.mixed_precision or default


def _tracker(name: str) -> str | None:
    """Return the tracker to report to, and check it: accelerate skips one that is not installed without a warning."""
    if name in ("none", "all") or name in [tracker.value for tracker in get_available_trackers()]:
        return None if name == "none" else name
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise ValueError(f"report_to must be one of {', '.join(known)}, all, none; got {name!r}")
    raise ImportError(f"report_to={name!r} needs {name}: pip install {name}, or give report_to='none'")
