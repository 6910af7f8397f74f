"""Images larger than a model was trained on, drawn by a cascade of stages."""

from clear_attn.cascade.attention_scale import proportional_attention
from clear_attn.cascade.large_images import highres
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.result import HighresError, HighresInterrupted, HighresResult
from clear_attn.cascade.rope import ntk_scaling
from clear_attn.cascade.stages import Base, Stage, StepwiseGuidance

__all__ = [
    "Base",
    "HighresError",
    "HighresInterrupted",
    "HighresPlan",
    "HighresResult",
    "Stage",
    "StepwiseGuidance",
    "highres",
    "ntk_scaling",
    "proportional_attention",
]
