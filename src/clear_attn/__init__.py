"""Local attention for pre-trained diffusion transformers, after CLEAR (arXiv 2412.16112)."""

from clear_attn import methods
from clear_attn.backends.attention import clear_attention
from clear_attn.cascade import (
    Base,
    HighresError,
    HighresInterrupted,
    HighresPlan,
    HighresResult,
    Stage,
    highres,
    ntk_scaling,
    proportional_attention,
)
from clear_attn.core.layout import TokenLayout
from clear_attn.methods.schedule import Schedule, noise_after
from clear_attn.models.processors import ClearAttnProcessor
from clear_attn.parallel import deparallelize
from clear_attn.parallel import parallelization as parallelize
from clear_attn.patching.context_managers import linearized
from clear_attn.patching.linearization import is_linearized, linearize, restore
from clear_attn.patching.saving import push_to_hub, save_pretrained
from clear_attn.profiling.attention_cost import cost
from clear_attn.profiling.cost_report import Cost
from clear_attn.profiling.window_plot import plot_window
from clear_attn.utils.validation import ClearConfig

__all__ = [
    "Base",
    "ClearAttnProcessor",
    "ClearConfig",
    "Cost",
    "HighresError",
    "HighresInterrupted",
    "HighresPlan",
    "HighresResult",
    "Schedule",
    "Stage",
    "TokenLayout",
    "clear_attention",
    "cost",
    "deparallelize",
    "highres",
    "is_linearized",
    "linearize",
    "linearized",
    "methods",
    "noise_after",
    "ntk_scaling",
    "parallelize",
    "plot_window",
    "proportional_attention",
    "push_to_hub",
    "restore",
    "save_pretrained",
]
