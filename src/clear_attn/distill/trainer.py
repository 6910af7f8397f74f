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

from clear_attn.distill import checkpoint
from clear_attn.distill.data import cache
from clear_attn.distill.data.cache import Cache
from clear_attn.distill.data.prepare import DTYPES, guidance_of
from clear_attn.distill.data.seeds import hash_of
from clear_attn.distill.losses import draw_sigmas
from clear_attn.distill.optimizers import make_optimizer, prepare_plugins, rate_of
from clear_attn.distill.settings import Settings
from clear_attn.distill.sharding import assign, is_spread, load_optimizer_state, optimizer_state, whole
from clear_attn.distill.step import Batch, Losses, Weights, distillation_losses
from clear_attn.distill.student import add_student, student_parameters, student_values
from clear_attn.methods import Method
from clear_attn.models import TrainingAdapter, training_adapter_for
from clear_attn.patching.linearization import linearize
from clear_attn.patching.target import find_transformer

RUN = "run"  # a checkpoint's part that is the same for all processes


def shared(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """What a run that continues another has to share with it."""
    return {
        **settings.shared(),
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
    }


def _warn_if_dense(pipe: Any, data: Cache, method: Method) -> None:
    transformer, adapter = find_transformer(pipe)
    side = adapter.latents_per_token(transformer)
    height, width = max(((height // side, width // side) for height, width in data.sizes), key=lambda size: sum(size))
    if method.covers((height, width)):
        warnings.warn(
            f"{method.as_arguments()} covers the largest image, {height} x {width} tokens: attention is dense, "
            "and there is nothing to distil; give a smaller window or a higher resolution",
            stacklevel=3,
        )


def _check_finite(value: float | Tensor | None, what: str) -> None:
    if value is not None and not math.isfinite(float(value)):
        raise FloatingPointError(
            f"{what} not finite; the last checkpoint is as it was. A lower learning_rate, or mixed_precision='bf16' "
            "for 'fp16', may help"
        )


class Run:
    """What a run holds: the model with its student, the optimizer, and how far it has come."""

    def __init__(self, settings: Settings, accelerator: Accelerator, pipe: Any, data: Cache) -> None:
        transformer, _ = find_transformer(pipe)
        self.settings, self.accelerator, self.data, self.step = settings, accelerator, data, 0
        _warn_if_dense(pipe, data, settings.attention)
        linearize(pipe, method=settings.attention, weights=None)
        transformer.to(accelerator.device)
        parameters = add_student(transformer, settings.rank if settings.student == "lora" else None, settings.seed)
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        self.bare, self.training = transformer, training_adapter_for(transformer)
        self.guidance = guidance_of(settings, transformer)
        schedule = pipe.scheduler.config
        self.shift = 1.0 if schedule.use_dynamic_shifting else schedule.shift
        self.matched = _matched_layers(settings, self.training, transformer)
        optimizer = make_optimizer(settings, parameters, accelerator.distributed_type)
        # Not prepared by accelerate, whose own would step once for each process.
        self.schedule = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        self.dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
        prepare_plugins(accelerator, settings)
        self.transformer, self.optimizer = accelerator.prepare(transformer, optimizer)
        self.average: dict[str, Tensor] = {}
        if settings.use_ema:
            averaged = {name: whole(p.detach()).float().cpu().clone() for name, p in self.trained().items()}
            self.average = averaged if accelerator.is_main_process else {}
        # The order of an epoch's batches, worked out once for each epoch.
        self.batches_of = functools.lru_cache(maxsize=1)(
            functools.partial(cache.batches, data.sizes, settings.train_batch_size, settings.seed)
        )
        self.batches_per_epoch = len(self.batches_of(0))

    def trained(self) -> dict[str, nn.Parameter]:
        return student_parameters(self.bare)

    def steps(self) -> Iterator[dict[str, float]]:
        """Trains up to the last step; gives each step's losses and learning rate."""
        while self.step < self.settings.max_train_steps:
            losses = self._one_step()
            self.step += 1
            yield {**losses, "learning_rate": rate_of(self.optimizer)}

    def _one_step(self) -> dict[str, float]:
        sums = dict.fromkeys(Losses._fields, 0.0)
        for batch, rng in self._batches():
            with self.accelerator.accumulate(self.transformer):
                with self.autocast():
                    losses = self._losses(batch, rng)
                # Of all processes, so that all of them stop at a loss that is not finite.
                values = self.accelerator.reduce(torch.stack(losses).detach().float(), "mean").tolist()
                for name, value in zip(sums, values, strict=True):
                    sums[name] += value / self.settings.gradient_accumulation_steps
                _check_finite(sums["total"], f"the loss of step {self.step + 1} ({sums}) is")
                self.accelerator.backward(losses.total)  # divides by the parts of a step
                if self.accelerator.sync_gradients:
                    self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        self._update_average()
        return sums

    def _clip(self) -> None:
        norm = self.accelerator.clip_grad_norm_(self.trained().values(), self.settings.max_grad_norm)
        if self.accelerator.scaler is None:  # which leaves out a step that overflows, and goes on
            _check_finite(norm if norm is None else whole(norm), f"the norm of the gradient of step {self.step + 1} is")

    def autocast(self) -> torch.autocast:
        """Mixed precision, not left to accelerate: under DeepSpeed it would round the student itself."""
        device = self.accelerator.device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def _update_average(self) -> None:
        if not self.settings.use_ema:
            return
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        for name, parameter in self.trained().items():
            value = whole(parameter.detach())
            if name in self.average:
                self.average[name].lerp_(value.float().cpu(), 1 - decay)

    def _batches(self) -> Iterator[tuple[Batch, torch.Generator]]:
        """Those of this step and this process, each with its randomness.

        All follow from a batch's number in the run, so a step's batches may come in parts or on several processes.
        """
        parts, processes = self.settings.gradient_accumulation_steps, self.accelerator.num_processes
        for part in range(parts):
            number = (self.step * parts + part) * processes + self.accelerator.process_index
            epoch, place = divmod(number, self.batches_per_epoch)
            rng = torch.Generator().manual_seed(hash_of(self.settings.seed, number))
            batch = self.data.read(self.batches_of(epoch)[place], rng)
            yield Batch(*(each.to(self.accelerator.device, self.bare.dtype) for each in batch)), rng

    def _losses(self, batch: Batch, rng: torch.Generator) -> Losses:
        settings = self.settings
        noise = torch.randn(batch.latents.shape, generator=rng).to(batch.latents)
        sigma = draw_sigmas(settings.weighting_scheme, len(noise), self.shift, rng).to(noise.device)
        return distillation_losses(
            self.transformer,
            self.training,
            batch,
            noise,
            sigma,
            weights=Weights(settings.flow_matching_weight, settings.prediction_weight, settings.attention_weight),
            matched=self.matched,
            guidance=self.guidance,
        )

    def save(self) -> None:
        """Writes a checkpoint; all processes have to call it."""
        accelerator, settings = self.accelerator, self.settings
        folder, main = Path(settings.output_dir), accelerator.is_main_process
        student = {name: whole(parameter.detach()) for name, parameter in self.trained().items()}
        for name, value in student.items():
            _check_finite(value.sum(), f"after step {self.step} {name} is")
        written = checkpoint.writing(folder, self.step, settings.checkpoints_total_limit)
        with written if main else contextlib.nullcontext(checkpoint.unfinished(folder, self.step)) as unfinished:
            accelerator.wait_for_everyone()
            if main:
                state = {
                    "step": self.step,
                    "student": student,
                    "average": self.average,
                    "schedule": self.schedule.state_dict(),
                }
                checkpoint.write(unfinished, RUN, state)
                checkpoint.write_settings(unfinished, shared(settings, accelerator))
            if main or is_spread(accelerator):
                checkpoint.write(unfinished, self._part(), optimizer_state(self.optimizer))
            accelerator.wait_for_everyone()

    def restore(self, saved: Path) -> None:
        """Goes back to a checkpoint of the same settings."""
        state = checkpoint.read(saved, RUN)
        for name, parameter in self.trained().items():
            assign(parameter, state["student"][name])
        if self.accelerator.is_main_process:
            self.average = state["average"]
        load_optimizer_state(self.optimizer, checkpoint.read(saved, self._part()))
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]

    def _part(self) -> str:
        return f"optimizer-{self.accelerator.process_index if is_spread(self.accelerator) else 0}"

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The distilled weights, in the model's own dtype; all processes have to ask for them."""
        with self.averaged():
            # Copied, for the student comes back into these parameters.
            values = student_values(self.bare).items()
            return {name: value.to("cpu", self.bare.dtype, copy=True) for name, value in values}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in the student's place, where there is one; all processes have to take part."""
        trained = self.trained() if self.settings.use_ema else {}
        present = {name: whole(parameter.detach()).cpu().clone() for name, parameter in trained.items()}
        for name, parameter in trained.items():
            # Under FSDP2 the first process's value is spread, and the others have no average.
            assign(parameter, self.average.get(name, present[name]))
        try:
            yield
        finally:
            for name, parameter in trained.items():
                assign(parameter, present[name])


def _matched_layers(settings: Settings, training: TrainingAdapter, transformer: Any) -> list[str]:
    layers = [name.removesuffix(".processor") for name in transformer.attn_processors]
    matched = training.matched_layers(layers) if settings.attention_layers is None else settings.attention_layers
    unknown = sorted(set(matched) - set(layers))
    if unknown:
        raise ValueError(f"attention_layers has {unknown[0]!r}, which is no attention layer of this model")
    return matched
