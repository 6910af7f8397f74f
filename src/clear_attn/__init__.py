"""Local attention for pre-trained diffusion transformers, after CLEAR (arXiv 2412.16112)."""

from clear_attn import methods
from clear_attn.attention import clear_attention
from clear_attn.blocks import linearized
from clear_attn.config import ClearConfig
from clear_attn.cost import cost
from clear_attn.highres import (
    Base,
    HighresFailed,
    HighresInterrupted,
    HighresPlan,
    HighresResult,
    Stage,
    highres,
    ntk_scaling,
    proportional_attention,
)
from clear_attn.layout import TokenLayout
from clear_attn.linearize import is_linearized, linearize, restore
from clear_attn.parallel import deparallelize, parallelize
from clear_attn.plot import plot_window
from clear_attn.processors import ClearAttnProcessor
from clear_attn.saving import push_to_hub, save_pretrained
from clear_attn.schedule import Schedule, noise_after
from clear_attn.work import Cost

__all__ = [
    "Base",
    "ClearAttnProcessor",
    "ClearConfig",
    "Cost",
    "HighresFailed",
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
