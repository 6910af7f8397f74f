"""Local attention for pre-trained diffusion transformers, after CLEAR (arXiv 2412.16112).

Public names are imported when first used, so that `import clear_attn` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clear_attn import methods
    from clear_attn.backends.attention import clear_attention
    from clear_attn.cascade.attention_scale import proportional_attention
    from clear_attn.cascade.large_images import highres
    from clear_attn.cascade.plan import HighresPlan
    from clear_attn.cascade.result import HighresError, HighresInterrupted, HighresResult
    from clear_attn.cascade.rope import ntk_scaling
    from clear_attn.cascade.stages import Base, Stage, StepwiseGuidance
    from clear_attn.core.layout import TokenLayout
    from clear_attn.methods.schedule import Schedule, sigma_after_step
    from clear_attn.models.processors.processor import ClearAttnProcessor
    from clear_attn.parallel.parallelization import deparallelize, parallelize
    from clear_attn.patching.context_managers import linearized
    from clear_attn.patching.description import Info, info
    from clear_attn.patching.linearization import linearize
    from clear_attn.patching.restoration import is_linearized, restore
    from clear_attn.patching.saving import push_to_hub, save_pretrained
    from clear_attn.profiling.attention_cost import cost
    from clear_attn.profiling.cost_report import Cost
    from clear_attn.profiling.window_plot import plot_window

__all__ = [
    "Base",
    "ClearAttnProcessor",
    "Cost",
    "HighresError",
    "HighresInterrupted",
    "HighresPlan",
    "HighresResult",
    "Info",
    "Schedule",
    "Stage",
    "StepwiseGuidance",
    "TokenLayout",
    "clear_attention",
    "cost",
    "deparallelize",
    "highres",
    "info",
    "is_linearized",
    "linearize",
    "linearized",
    "methods",
    "ntk_scaling",
    "parallelize",
    "plot_window",
    "proportional_attention",
    "push_to_hub",
    "restore",
    "save_pretrained",
    "sigma_after_step",
]

# Where each public name is defined; `methods` is a package itself.
_MODULES = {
    "Base": "cascade.stages",
    "ClearAttnProcessor": "models.processors.processor",
    "Cost": "profiling.cost_report",
    "HighresError": "cascade.result",
    "HighresInterrupted": "cascade.result",
    "HighresPlan": "cascade.plan",
    "HighresResult": "cascade.result",
    "Info": "patching.description",
    "Schedule": "methods.schedule",
    "Stage": "cascade.stages",
    "StepwiseGuidance": "cascade.stages",
    "TokenLayout": "core.layout",
    "clear_attention": "backends.attention",
    "cost": "profiling.attention_cost",
    "deparallelize": "parallel.parallelization",
    "highres": "cascade.large_images",
    "info": "patching.description",
    "is_linearized": "patching.restoration",
    "linearize": "patching.linearization",
    "linearized": "patching.context_managers",
    "sigma_after_step": "methods.schedule",
    "ntk_scaling": "cascade.rope",
    "parallelize": "parallel.parallelization",
    "plot_window": "profiling.window_plot",
    "proportional_attention": "cascade.attention_scale",
    "push_to_hub": "patching.saving",
    "restore": "patching.restoration",
    "save_pretrained": "patching.saving",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        versions = importlib.import_module("clear_attn.utils.versions")
        value: Any = versions.installed_version("clear-attn") or "unknown"
    elif name == "methods":
        value = importlib.import_module("clear_attn.methods")
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"clear_attn.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
