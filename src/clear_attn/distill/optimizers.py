"""The optimizers of a run, what they hold in memory, and the settings of DeepSpeed and FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from clear_attn.distill.settings import Settings

# Prodigy estimates its rate from every 11th value, which saves most of the memory of two of its four states.
SLICE = 11
# Values that an optimizer keeps for each parameter; in float32, but for adamw8bit.
STATES = {"adamw": 2.0, "prodigy": 2 + 2 / SLICE, "adamw8bit": 0.5}


def check_optimizer(settings: Settings, accelerator: Accelerator) -> None:
    """Check early whether the optimizer can be made and works with accelerate's configuration.

    Raises:
        ValueError: the optimizer does not work with FSDP; accelerate is configured with other
            gradient_accumulation_steps; float16 with DeepSpeed.
        ImportError: its library is not installed.
    """
    make_optimizer(settings, [nn.Parameter(torch.zeros(1))], accelerator.distributed_type)
    configured, asked = accelerator.gradient_accumulation_steps, settings.gradient_accumulation_steps
    if configured != asked:
        raise ValueError(
            f"accelerate is configured with {configured} gradient_accumulation_steps, and the run with {asked}; give "
            "both the same"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16' does not work with DeepSpeed here; use bf16")


def make_optimizer(
    settings: Settings, parameters: list[nn.Parameter], distributed: DistributedType
) -> torch.optim.Optimizer:
    """Return the optimizer of the settings.

    Raises:
        ValueError: it does not work with FSDP.
        ImportError: its library is not installed.
    """
    rate, decay = settings.rate, settings.adam_weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    if distributed == DistributedType.FSDP:
        raise ValueError(f"optimizer={settings.optimizer!r} does not work with FSDP; use adamw, or DeepSpeed's ZeRO-2")
    try:
        if settings.optimizer == "prodigy":
            from prodigyopt import Prodigy

            # With a sharded state and without this flag, each process would adapt its own rate.
            sharded = distributed == DistributedType.DEEPSPEED
            return Prodigy(parameters, lr=rate, weight_decay=decay, slice_p=SLICE, fsdp_in_use=sharded)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, weight_decay=decay)
    except ImportError as error:
        raise ImportError(f"optimizer={settings.optimizer!r} needs {error.name}: pip install {error.name}") from None


def rate_of(optimizer: Any) -> float:
    """Return the current learning rate, of Prodigy the one that it has found."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


def prepare_plugins(accelerator: Accelerator, settings: Settings) -> None:
    """Make DeepSpeed and FSDP2 compute as one process does.

    The student stays in float32 and autocast rounds copies. Their own bfloat16 would also round the student, gradients
    between processes, and positions in the model's inputs.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    # accelerate would read it from a data loader.
    config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
    config["gradient_clipping"] = settings.max_grad_norm
    # Without it DeepSpeed turns autocast off. No modules are listed, since their gradients would be rounded.
    autocast = accelerator.mixed_precision == "bf16"  # accelerate reads it from the same config
    config["torch_autocast"] = {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["bf16"] = {"enabled": False}


def counted(trunk: int, student: int, optimizer: str) -> dict[str, float]:
    """Return the bytes of each part of a training step, without activations.

    Args:
        trunk: number of parameters of the transformer, in bfloat16.
        student: number of trained parameters, in float32.
        optimizer: its name.
    """
    return {
        "trunk, bfloat16": 2 * trunk,
        "student, float32": 4 * student,
        "its gradient, float32": 4 * student,
        f"{optimizer}'s states": 4 * student * STATES[optimizer],
        "autocast's copies, bfloat16": 2 * student,
    }
