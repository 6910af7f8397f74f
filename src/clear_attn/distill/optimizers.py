"""The optimizers that a run may take, and what DeepSpeed and FSDP2 have to be told."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from clear_attn.distill.settings import Settings

# Prodigy estimates its rate from every so many values, which saves most of two of its four states' memory.
SLICE = 11


def check_optimizer(settings: Settings, accelerator: Accelerator) -> None:
    """Raises what `make_optimizer` and `prepare_plugins` would, before anything has taken time.

    Raises:
        ValueError: the optimizer does not work with FSDP; accelerate was told otherwise of the parts of a step;
            float16 with DeepSpeed.
        ImportError: its library is not installed.
    """
    make_optimizer(settings, [nn.Parameter(torch.zeros(1))], accelerator.distributed_type)
    told = accelerator.gradient_accumulation_steps
    if told != settings.gradient_accumulation_steps:
        raise ValueError(
            f"accelerate was configured with {told} gradient_accumulation_steps, and the run is to have "
            f"{settings.gradient_accumulation_steps}; give the run as many, or configure accelerate anew"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16' does not work with DeepSpeed here; use bf16")


def make_optimizer(
    settings: Settings, parameters: list[nn.Parameter], distributed: DistributedType
) -> torch.optim.Optimizer:
    """The optimizer that the settings name.

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

            # Where the state is spread, each process would adapt a step of its own unless told that it is.
            spread = distributed == DistributedType.DEEPSPEED
            return Prodigy(parameters, lr=rate, weight_decay=decay, slice_p=SLICE, fsdp_in_use=spread)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, weight_decay=decay)
    except ImportError as error:
        raise ImportError(f"optimizer={settings.optimizer!r} needs {error.name}: pip install {error.name}") from None


def rate_of(optimizer: Any) -> float:
    """The present learning rate: of Prodigy the one that it has found."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


def prepare_plugins(accelerator: Accelerator, settings: Settings) -> None:
    """Tells DeepSpeed or FSDP2, where one is used, how to compute: as without it.

    The student stays in float32 and autocast rounds copies; their own bfloat16 would round the model with the student,
    gradients on their way, and the positions that the model is given.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    # What accelerate would read from a data loader.
    config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
    config["gradient_clipping"] = settings.max_grad_norm
    # DeepSpeed turns autocast off unless it is told of it; no module's gradients are to be rounded on their way.
    autocast = accelerator.mixed_precision == "bf16"  # which accelerate reads from this very config
    config["torch_autocast"] = {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["bf16"] = {"enabled": False}
