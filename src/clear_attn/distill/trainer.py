"""The training loop: steps, checkpoints and the result."""

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
from clear_attn.distill.sharding import assign, is_sharded, load_optimizer_state, optimizer_state, whole
from clear_attn.distill.step import Batch, Losses, Weights, distillation_losses
from clear_attn.distill.student import add_student, student_parameters, student_values
from clear_attn.methods import Method
from clear_attn.models import ModelAdapter, TrainingAdapter, training_adapter_for
from clear_attn.patching.linearization import linearize
from clear_attn.patching.target import find_target
from clear_attn.utils._torch import map_tensors

RUN = "run"  # the part of a checkpoint that all processes share


def shared(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """Return the settings and the configuration that must be the same when this run is resumed."""
    return {
        **settings.shared(),
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
    }


def _warn_if_dense(adapter: ModelAdapter, transformer: Any, data: Cache, method: Method) -> None:
    side = adapter.latents_per_token(transformer)
    height, width = max(((height // side, width // side) for height, width in data.sizes), key=sum)
    if method.covers((height, width)):
        warnings.warn(
            f"{method.as_arguments()} covers the largest image, {height} x {width} tokens: attention is dense, "
            "and there is nothing to distill; give a smaller window or a higher resolution",
            stacklevel=3,
        )


def _check_finite(value: float | Tensor, what: str) -> None:
    if not math.isfinite(float(value)):
        raise FloatingPointError(
            f"{what} not finite; the last checkpoint is unchanged. A lower learning_rate, or mixed_precision='bf16' "
            "for 'fp16', may help"
        )


class Run:
    """The state of a training run: the model with its student, the optimizer, and the number of finished steps."""

    def __init__(self, settings: Settings, accelerator: Accelerator, pipe: Any, data: Cache) -> None:
        self.settings, self.accelerator, self.data, self.step = settings, accelerator, data, 0
        target = find_target(pipe)
        self.bare = transformer = target.transformer
        _warn_if_dense(target.adapter, transformer, data, settings.attention)
        linearize(pipe, method=settings.attention, weights=None)
        transformer.to(accelerator.device)
        parameters = add_student(transformer, settings.rank if settings.student == "lora" else None, settings.seed)
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        self.training = training_adapter_for(transformer)
        self.guidance = guidance_of(settings, transformer)
        scheduler = pipe.scheduler.config
        self.shift = 1.0 if scheduler.use_dynamic_shifting else scheduler.shift
        self.matched = _matched_layers(settings, self.training, list(target.layers))
        optimizer = make_optimizer(settings, parameters, accelerator.distributed_type)
        # Not prepared by accelerate, because its scheduler would step once for each process.
        self.schedule = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        self.dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
        prepare_plugins(accelerator, settings)
        self.transformer, self.optimizer = accelerator.prepare(transformer, optimizer)
        # Only the main process keeps the moving average.
        self.average: dict[str, Tensor] = {}
        if settings.use_ema:
            values = self._whole_values()
            self.average = (
                {name: value.float() for name, value in values.items()} if accelerator.is_main_process else {}
            )
        self.batches_of = functools.lru_cache(maxsize=1)(
            functools.partial(cache.batches, data.sizes, settings.train_batch_size, settings.seed)
        )
        self.batches_per_epoch = len(self.batches_of(0))

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters to train, by name."""
        return student_parameters(self.bare)

    def _whole_values(self) -> dict[str, Tensor]:
        """Return copies of the trained values on the CPU; all processes must call it."""
        return {name: whole(parameter.detach()).cpu().clone() for name, parameter in self.trained().items()}

    def steps(self) -> Iterator[dict[str, float]]:
        """Train to the last step, and yield each step's losses and learning rate."""
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
                # Average over all processes, so that all of them stop at a loss that is not finite.
                values = self.accelerator.reduce(torch.stack(losses).detach().float(), "mean").tolist()
                for name, value in zip(sums, values, strict=True):
                    sums[name] += value / self.settings.gradient_accumulation_steps
                _check_finite(sums["total"], f"the loss of step {self.step + 1} ({sums}) is")
                self.accelerator.backward(losses.total)  # accelerate divides by the number of batches in a step
                if self.accelerator.sync_gradients:
                    self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        self._update_average()
        return sums

    def _clip(self) -> None:
        norm = self.accelerator.clip_grad_norm_(self.trained().values(), self.settings.max_grad_norm)
        # A gradient scaler skips a step that overflows. DeepSpeed clips by itself and returns no norm.
        if self.accelerator.scaler is None and norm is not None:
            _check_finite(whole(norm), f"the norm of the gradient of step {self.step + 1} is")

    def autocast(self) -> torch.autocast:
        """Return the autocast context; accelerate's own would round the student under DeepSpeed."""
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
        """Yield this process's batches of a step, each with its random generator.

        Both depend only on the batch's number in the run, not on the number of batches or processes in a step.
        """
        parts, processes = self.settings.gradient_accumulation_steps, self.accelerator.num_processes
        device, dtype = self.accelerator.device, self.bare.dtype
        for part in range(parts):
            number = (self.step * parts + part) * processes + self.accelerator.process_index
            epoch, place = divmod(number, self.batches_per_epoch)
            rng = torch.Generator().manual_seed(hash_of(self.settings.seed, number))
            batch = self.data.read(self.batches_of(epoch)[place], rng)
            yield map_tensors(lambda tensor: tensor.to(device, dtype), batch), rng

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
        """Write a checkpoint; all processes must call it."""
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
            if main or is_sharded(accelerator):
                checkpoint.write(unfinished, self._optimizer_part(), optimizer_state(self.optimizer))
            accelerator.wait_for_everyone()

    def restore(self, saved: Path) -> None:
        """Load a checkpoint that was made with the same settings."""
        state = checkpoint.read(saved, RUN)
        optimizer = checkpoint.read(saved, self._optimizer_part())
        for name, parameter in self.trained().items():
            assign(parameter, state["student"][name])
        if self.accelerator.is_main_process:
            self.average = state["average"]
        load_optimizer_state(self.optimizer, optimizer)
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]

    def _optimizer_part(self) -> str:
        return f"optimizer-{self.accelerator.process_index if is_sharded(self.accelerator) else 0}"

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """Return the distilled weights in the model's own dtype; all processes must call it."""
        with self.averaged():
            # Copy, because `averaged` restores the student's values in these parameters.
            values = student_values(self.bare).items()
            return {name: value.to("cpu", self.bare.dtype, copy=True) for name, value in values}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the moving average, if there is one, in a `with` block; all processes must call it."""
        if not self.settings.use_ema:
            yield
            return
        present = self._whole_values()
        self._assign({**present, **self.average})  # FSDP2 takes the values of the first process, which has the average
        try:
            yield
        finally:
            self._assign(present)

    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trained().items():
            assign(parameter, values[name])


def _matched_layers(settings: Settings, training: TrainingAdapter, layers: list[str]) -> list[str]:
    matched = training.matched_layers(layers) if settings.attention_layers is None else settings.attention_layers
    unknown = sorted(set(matched) - set(layers))
    if unknown:
        raise ValueError(
            f"attention_layers has {unknown[0]!r}, which is not an attention layer of this model; it has {layers[0]} "
            f"to {layers[-1]}"
        )
    return matched
