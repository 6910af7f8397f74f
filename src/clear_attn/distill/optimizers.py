"""The optimizers of a run, their memory, and the settings of DeepSpeed and FSDP2."""

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
# The optimizer states per parameter, in float32 values; adamw8bit's states have 8 bits.
STATES = {"adamw": 2.0, "prodigy": 2 + 2 / SLICE, "adamw8bit": 0.5}


def check_optimizer(settings: Settings, accelerator: Accelerator) -> None:
    """Check early that the optimizer can be made and works with accelerate's configuration.

    Raises:
        ValueError: the optimizer does not work with FSDP, accelerate is configured with other
            gradient_accumulation_steps, or float16 is used with DeepSpeed.
        ImportError: the optimizer's library is not installed.
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
        ValueError: the optimizer does not work with FSDP.
        ImportError: the optimizer's library is not installed.
    """
    rate, decay = settings.rate, settings.adam_weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    if distributed == DistributedType.FSDP:
        raise ValueError(f"optimizer={settings.optimizer!r} does not work with FSDP; use adamw, or DeepSpeed's ZeRO-2")
    try:
        if settings.optimizer == "prodigy":
            from prodigyopt import Prodigy

            # Without this flag, each process with a sharded state would adapt its own rate.
            sharded = distributed == DistributedType.DEEPSPEED
            return Prodigy(parameters, lr=rate, weight_decay=decay, slice_p=SLICE, fsdp_in_use=sharded)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, weight_decay=decay)
    except ImportError as error:
        raise ImportError(f"optimizer={settings.optimizer!r} needs {error.name}: pip install {error.name}") from None


def rate_of(optimizer: Any) -> float:
    """Return the current learning rate; for Prodigy, the rate that it has adapted."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


def prepare_plugins(accelerator: Accelerator, settings: Settings) -> None:
    """Configure DeepSpeed and FSDP2 so that they compute the same as one process.

    The student stays in float32, and autocast casts copies. Their own bfloat16 modes would also round the student, the
    gradients between processes, and the positions in the model's inputs.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    # There is no data loader from which accelerate could read it.
    config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
    config["gradient_clipping"] = settings.max_grad_norm
    # Without it DeepSpeed turns autocast off. The list of modules is empty, because their gradients would be rounded.
    autocast = accelerator.mixed_precision == "bf16"  # accelerate reads it from the same config
    config["torch_autocast"] = {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["bf16"] = {"enabled": False}


def counted(trunk: int, student: int, optimizer: str) -> dict[str, float]:
    """Return the bytes of each part of a training step, without activations.

    Args:
        trunk: the number of parameters of the transformer, in bfloat16.
        student: the number of trained parameters, in float32.
        optimizer: the name of the optimizer.
    """
    return {
        "trunk, bfloat16": 2 * trunk,
        "student, float32": 4 * student,
        "its gradient, float32": 4 * student,
        f"{optimizer}'s states": 4 * student * STATES[optimizer],
        "autocast's copies, bfloat16": 2 * student,
    }
