"""Pictures by teacher and student of the same prompts and seeds, while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from clear_attn.distill.data.prepare import drawing_of
from clear_attn.distill.data.seeds import hash_of
from clear_attn.distill.settings import Settings
from clear_attn.distill.student import STUDENT, TEACHER, keywords
from clear_attn.models import training_adapter_for
from clear_attn.patching.target import find_transformer
from clear_attn.utils.atomic import atomic_file
from clear_attn.utils.image_sheets import contact_sheet
from clear_attn.utils.seeded_images import generate_with_seeds

FOLDER = "validation"


class Validation:
    """Draws the validation prompts, through the trunk that is being trained.

    The prompts are encoded at once, so that the text encoders can go.

    Args:
        settings: of the run.
        accelerator: of the run.
        pipe: with its text encoders, before it is prepared for training.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, pipe: Any) -> None:
        self.settings, self.accelerator, self.pipe = settings, accelerator, pipe
        self.prompts = settings.validation_prompts or []
        transformer, adapter = find_transformer(pipe)
        training, self.keywords = training_adapter_for(transformer), adapter.keywords
        self.drawing = drawing_of(settings, pipe)
        with torch.no_grad():
            self.embeddings = [training.embeddings(pipe, [p], self.drawing.text_tokens) for p in self.prompts]
        self.rows: dict[str, list[Image.Image]] = {}

    def draw(self, step: int) -> None:
        """One sheet, in the output directory and to the trackers; under FSDP2 all processes have to draw."""
        if not self.prompts:
            return
        if not self.rows:
            self.rows["teacher"] = self._pictures(TEACHER)
        sheet = contact_sheet({**self.rows, f"student, step {step}": self._pictures(STUDENT)}, self.prompts)
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

    def _pictures(self, role: str) -> list[Image.Image]:
        pipe, device = self.pipe, self.accelerator.device
        pipe.vae.to(device)
        pipe.set_progress_bar_config(disable=True)
        pictures = [
            generate_with_seeds(
                pipe,
                # Not the noise of the training picture of the same number.
                [hash_of("validation", self.drawing.seed, number)],
                **{name: value.to(device) for name, value in embeddings.items()},
                **{self.keywords: keywords(role)},
                **self.drawing.arguments(),
            )[0]
            for number, embeddings in enumerate(self.embeddings)
        ]
        pipe.vae.to("cpu")
        return pictures
