"""From a model's name and pictures to distilled weights."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from clear_attn.distill import checkpoint, prepare
from clear_attn.distill.run import Run
from clear_attn.distill.settings import Settings
from clear_attn.saving import check_folder, save_values


def train(settings: Settings) -> Path:
    """Distils a model and saves the result as `clear_attn.save_pretrained` does.

    Args:
        settings (`Settings`): of the run.

    Returns:
        The folder of the result, `settings.output_dir`.

    Raises:
        ValueError: settings out of range; pictures without captions; a cache or a checkpoint of something else.
        FileExistsError: the folder holds another run.
        FileNotFoundError: there is no such checkpoint, or no such file of prompts.
        NotADirectoryError: a folder is a file.
        ImportError: what the settings name needs a library that is not installed.
        FloatingPointError: a loss was not finite; nothing has been overwritten then.
    """
    settings.check()
    folder = check_folder(settings.output_dir)
    resumed = checkpoint.find(folder, settings.resume_from_checkpoint)
    state = checkpoint.load(resumed) if resumed else None
    if state:
        checkpoint.same_values(state["settings"], settings.fixed())
    examples = prepare.examples(settings)
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        log_with=settings.report_to,
        project_config=ProjectConfiguration(settings.output_dir, str(folder / settings.logging_dir)),
    )
    pipe = prepare.load(settings, accelerator)
    data = prepare.data(settings, accelerator, pipe, examples)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(settings, accelerator, pipe, data)
    if state:
        run.restore(state)
    run.go()
    if accelerator.is_main_process:
        save_values(pipe, settings.config, run.result(), folder)
    accelerator.end_training()
    return folder
