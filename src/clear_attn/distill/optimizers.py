"""The optimizers that a run may take."""

from __future__ import annotations

import torch
from torch import nn

from clear_attn.distill.settings import Settings


def make_optimizer(settings: Settings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Raises ImportError where the optimizer's library is not installed."""
    rate, decay = settings.learning_rate, settings.adam_weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    try:
        if settings.optimizer == "prodigy":
            from prodigyopt import Prodigy

            # slice_p: its estimate from every eleventh value, which saves two of its four states' memory.
            return Prodigy(parameters, lr=rate, weight_decay=decay, slice_p=11)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, weight_decay=decay)
    except ImportError as error:
        raise ImportError(f"optimizer={settings.optimizer!r} needs {error.name}: pip install {error.name}") from None
