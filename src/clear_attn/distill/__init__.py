"""Training of linearized attention after the same model's dense attention."""

from clear_attn.distill.settings import Settings
from clear_attn.distill.training import train

__all__ = ["Settings", "train"]
