"""The loop of training: steps, checkpoints, and what each step needs."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from clear_attn.distill import cache, checkpoint
from clear_attn.distill.cache import Cache
from clear_attn.distill.optimizers import make_optimizer
from clear_attn.distill.recipes import recipe_of
from clear_attn.distill.seeds import hash_of
from clear_attn.distill.settings import Settings
from clear_attn.distill.step import Batch, Losses, Weights, distillation_losses
from clear_attn.distill.student import add_student, student_parameters, student_values
from clear_attn.linearize import find_transformer, linearize


def _warn_if_dense(pipe: Any, data: Cache, window: int) -> None:
    transformer, family = find_transformer(pipe)
    side = family.latents_per_token(transformer)
    height, width = max(((height // side, width // side) for height, width in data.sizes), key=lambda size: sum(size))
    if (height - 1) ** 2 + (width - 1) ** 2 < window**2:
        warnings.warn(
            f"a window of {window} tokens covers the largest picture, {height} x {width} tokens: attention is dense, "
            "and there is nothing to distil; give a smaller window or a higher resolution",
            stacklevel=3,
        )


def _check_finite(losses: Losses, step: int) -> None:
    values = {name: loss.item() for name, loss in losses._asdict().items()}
    if not math.isfinite(values["total"]):
        raise FloatingPointError(
            f"the loss of step {step} is not finite: {values}; the last checkpoint is as it was. A lower "
            "learning_rate, or mixed_precision='bf16' for 'fp16', may help"
        )


class Run:
    """What a run holds: the model with its student, the optimizer, and how far it has come."""

    def __init__(self, settings: Settings, accelerator: Accelerator, pipe: Any, data: Cache) -> None:
        transformer, _ = find_transformer(pipe)
        self.settings, self.accelerator, self.data, self.step = settings, accelerator, data, 0
        _warn_if_dense(pipe, data, settings.window)
        linearize(pipe, settings.window, settings.down_factor, weights=None)
        transformer.to(accelerator.device)
        parameters = add_student(transformer, settings.rank if settings.student == "lora" else None)
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        self.bare, self.recipe = transformer, recipe_of(transformer)
        self.guidance = settings.guidance_scale if transformer.config.get("guidance_embeds") else None
        layers = [name.removesuffix(".processor") for name in transformer.attn_processors]
        self.matched = settings.attention_layers
        if self.matched is None:
            self.matched = self.recipe.matched_layers(layers)
        unknown = sorted(set(self.matched) - set(layers))
        if unknown:
            raise ValueError(f"attention_layers has {unknown[0]!r}, which is no attention layer of this model")
        optimizer = make_optimizer(settings, parameters)
        schedule = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        self.schedule = schedule  # not accelerate's, which would step once for each process
        self.transformer, self.optimizer = accelerator.prepare(transformer, optimizer)
        averaged = self.trained() if settings.use_ema else {}
        self.average = {name: p.detach().float().cpu().clone() for name, p in averaged.items()}
        # The order of an epoch's batches, worked out once for each epoch.
        self.batches_of = functools.lru_cache(maxsize=1)(
            functools.partial(cache.batches, data.sizes, settings.train_batch_size, settings.seed)
        )
        self.batches_per_epoch = len(self.batches_of(0))
        accelerator.init_trackers("distill", config={k: v for k, v in settings.fixed().items() if v is not None})

    def trained(self) -> dict[str, nn.Parameter]:
        return student_parameters(self.bare)

    def go(self) -> None:
        """Trains up to the last step."""
        settings = self.settings
        progress = tqdm(
            initial=self.step,
            total=settings.max_train_steps,
            desc="distilling",
            disable=not self.accelerator.is_local_main_process,
        )
        while self.step < settings.max_train_steps:
            losses = self._one_step()
            self.step += 1
            progress.update()
            progress.set_postfix(loss=f"{losses['total']:.4f}")
            self.accelerator.log({**losses, "learning_rate": self.schedule.get_last_lr()[0]}, step=self.step)
            last = self.step == settings.max_train_steps
            if (self.step % settings.checkpointing_steps == 0 or last) and self.accelerator.is_main_process:
                folder = Path(settings.output_dir)
                checkpoint.save(folder, self.step, self.state(), settings.checkpoints_total_limit)
        progress.close()

    def _one_step(self) -> dict[str, float]:
        sums = dict.fromkeys(Losses._fields, 0.0)
        count = self.settings.gradient_accumulation_steps
        for part, batch in enumerate(self._batches()):
            synced = part == count - 1
            context = self.accelerator.no_sync(self.transformer) if not synced else contextlib.nullcontext()
            with context, self.accelerator.autocast():
                losses = self._losses(batch, part)
                for name, loss in losses._asdict().items():
                    sums[name] += loss.item() / count
                _check_finite(losses, self.step + 1)
            self.accelerator.backward(losses.total / count)
        self.accelerator.clip_grad_norm_(self.trained().values(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        decay, parameters = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step)), self.trained()
        for name, average in self.average.items():
            average.lerp_(parameters[name].detach().float().cpu(), 1 - decay)
        return sums

    def _batches(self) -> Iterator[Batch]:
        """Those of this step and this process; a function of the step alone."""
        parts, processes = self.settings.gradient_accumulation_steps, self.accelerator.num_processes
        for part in range(parts):
            number = (self.step * parts + part) * processes + self.accelerator.process_index
            epoch, place = divmod(number, self.batches_per_epoch)
            yield self._on_device(self.data.read(self.batches_of(epoch)[place], self._rng(part)))

    def _on_device(self, batch: Batch) -> Batch:
        dtype = self.bare.dtype
        return Batch(*(each.to(self.accelerator.device, dtype) for each in batch))

    def _rng(self, part: int) -> torch.Generator:
        numbers = self.settings.seed, self.step, part, self.accelerator.process_index
        return torch.Generator().manual_seed(hash_of(*numbers))

    def _losses(self, batch: Batch, part: int) -> Losses:
        rng, settings = self._rng(-1 - part), self.settings
        noise = torch.randn(batch.latents.shape, generator=rng).to(batch.latents)
        sigma = torch.rand(len(batch.latents), generator=rng).to(batch.latents.device)
        return distillation_losses(
            self.transformer,
            self.recipe,
            batch,
            noise,
            sigma,
            weights=Weights(settings.flow_matching_weight, settings.prediction_weight, settings.attention_weight),
            matched=self.matched or (),
            guidance=self.guidance,
        )

    def state(self) -> dict[str, Any]:
        """All that a run which goes on from here needs."""
        return {
            "step": self.step,
            "settings": self.settings.fixed(),
            "student": {name: parameter.detach() for name, parameter in self.trained().items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        for name, parameter in self.trained().items():
            parameter.copy_(state["student"][name])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The distilled weights, in the model's own dtype."""
        parameters = self.trained()
        for name, average in self.average.items():
            parameters[name].copy_(average)
        dtype = self.bare.dtype
        return {name: value.to("cpu", dtype).contiguous() for name, value in student_values(self.bare).items()}
