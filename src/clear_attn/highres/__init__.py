"""Pictures larger than a model was trained on: a cascade of stages, and what keeps each of them right."""

from clear_attn.highres.draw import highres
from clear_attn.highres.plan import HighresPlan
from clear_attn.highres.proportional import proportional_attention
from clear_attn.highres.result import HighresFailed, HighresInterrupted, HighresResult
from clear_attn.highres.rope import ntk_scaling
from clear_attn.highres.stages import Base, Stage

__all__ = [
    "Base",
    "HighresFailed",
    "HighresInterrupted",
    "HighresPlan",
    "HighresResult",
    "Stage",
    "highres",
    "ntk_scaling",
    "proportional_attention",
]
