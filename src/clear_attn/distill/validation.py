"""Compare images of teacher and student, with the same prompts and seeds, during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from clear_attn.distill.data.prepare import generation_of
from clear_attn.distill.data.seeds import hash_of
from clear_attn.distill.settings import Settings
from clear_attn.distill.student import STUDENT, TEACHER, keywords
from clear_attn.models import training_adapter_for
from clear_attn.patching.target import find_transformer
from clear_attn.utils.atomic import atomic_file
from clear_attn.utils.image_sheets import contact_sheet

FOLDER = "validation"


class Validation:
    """Generate images of the validation prompts with the transformer in training.

    The prompts are encoded on construction, so that the text encoders can be freed.

    Args:
        settings: the settings of the run.
        accelerator: the accelerator of the run.
        pipe: the pipeline with its text encoders, before it is prepared for training.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, pipe: Any) -> None:
        self.settings, self.accelerator, self.pipe = settings, accelerator, pipe
        self.prompts = settings.validation_prompts or []
        transformer, adapter = find_transformer(pipe)
        self.training, self.keywords = training_adapter_for(transformer), adapter.keywords
        self.generation = generation_of(settings, pipe)
        length = self.generation.text_tokens
        with torch.no_grad():
            self.texts = [self.training.pipeline_arguments(pipe, [prompt], length) for prompt in self.prompts]
        self.rows: dict[str, list[Image.Image]] = {}

    def draw(self, step: int) -> None:
        """Write a sheet of images to the output directory and the trackers; under FSDP2 all processes must call it."""
        if not self.prompts:
            return
        if not self.rows:
            self.rows["teacher"] = self._images(TEACHER)
        sheet = contact_sheet({**self.rows, f"student, step {step}": self._images(STUDENT)}, self.prompts)
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.settings.output_dir, FOLDER)
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"step-{step}.png") as unfinished:
            sheet.save(unfinished)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": [sheet]}, step=step)

    def _images(self, role: str) -> list[Image.Image]:
        device, arguments = self.accelerator.device, {self.keywords: keywords(role)}
        self.pipe.vae.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        images = []
        for number, text in enumerate(self.texts):
            # The seed differs from that of the training image with the same number.
            seed = hash_of("validation", self.generation.seed, number)
            text = {name: tensor.to(device) for name, tensor in text.items()}
            images += self.generation.run(self.pipe, self.training, [seed], text, **arguments)
        self.pipe.vae.to("cpu")
        return images
