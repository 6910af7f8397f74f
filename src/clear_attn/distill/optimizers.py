"""The optimizers that a run may take, and what DeepSpeed has to be told."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from clear_attn.distill.settings import Settings


def make_optimizer(
    settings: Settings, parameters: list[nn.Parameter], accelerator: Accelerator
) -> torch.optim.Optimizer:
    """The optimizer that the settings name.

    Raises:
        ValueError: it does not work with FSDP.
        ImportError: its library is not installed.
    """
    rate, decay = settings.learning_rate, settings.adam_weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(f"optimizer={settings.optimizer!r} does not work with FSDP; use adamw, or DeepSpeed's ZeRO-2")
    try:
        if settings.optimizer == "prodigy":
            from prodigyopt import Prodigy

            # slice_p: its estimate from every eleventh value, which saves most of two of its four states' memory.
            # Where the state is spread, each process would adapt a step of its own unless told that it is.
            spread = accelerator.distributed_type == DistributedType.DEEPSPEED
            return Prodigy(parameters, lr=rate, weight_decay=decay, slice_p=11, fsdp_in_use=spread)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, weight_decay=decay)
    except ImportError as error:
        raise ImportError(f"optimizer={settings.optimizer!r} needs {error.name}: pip install {error.name}") from None


def set_up_deepspeed(accelerator: Accelerator, settings: Settings) -> None:
    """Tells DeepSpeed, where it is used, what accelerate would read from a data loader, and how to clip and compute.

    The student stays in float32, as without it, and autocast rounds copies; DeepSpeed's own bfloat16 would round the
    model with the student.

    Raises:
        ValueError: float16, which needs DeepSpeed's own way.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16' does not work with DeepSpeed here; use bf16")
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
    config["gradient_clipping"] = settings.max_grad_norm
    # DeepSpeed turns autocast off unless it is told of it; no module's gradients are to be rounded on their way.
    autocast = accelerator.mixed_precision == "bf16"  # which accelerate reads from this very config
    config["torch_autocast"] = {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["bf16"] = {"enabled": False}
