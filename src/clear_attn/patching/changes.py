"""Attention parameters that others changed while a pipeline was linearized."""

from __future__ import annotations

import warnings

from torch import Tensor

from clear_attn.models.processors.processor import ClearAttnProcessor
from clear_attn.patching.target import Target
from clear_attn.weights.parameters import own_parameters, replaced_parameters
from clear_attn.weights.samples import changed, changed_beyond_rounding


def changed_parameters(target: Target) -> list[str]:
    """Return the names of attention parameters whose values changed since `linearize`."""
    return changed(_parameters(target), target.hook.samples) if target.hook else []


def warn_if_changed(target: Target, stacklevel: int) -> None:
    """Warn if attention parameters changed since `linearize`, which `restore` or another `linearize` overwrites."""
    hook = target.hook
    if hook is None:
        return
    # Without kept originals, only the processors' own parameters are lost.
    lost = _parameters(target) if hook.original.values else own_parameters(_our_processors(target))
    names = changed_beyond_rounding(lost, hook.samples)
    if names:
        warnings.warn(
            f"the values of {len(names)} attention parameters ({names[0]}, ...) changed since clear_attn.linearize(), "
            "as by training, load_state_dict(), or a LoRA that was fused and unloaded; they are replaced by those from "
            "before linearize(), and what changed in other layers stays, so the two may not fit: load the pipeline "
            "again, or save first with clear_attn.save_pretrained()",
            stacklevel=stacklevel + 1,
        )


def _parameters(target: Target) -> dict[str, Tensor]:
    return {**replaced_parameters(target.layers), **own_parameters(_our_processors(target))}


def _our_processors(target: Target) -> dict[str, ClearAttnProcessor]:
    return {name: each for name, each in target.processors.items() if isinstance(each, ClearAttnProcessor)}
