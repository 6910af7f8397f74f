"""The preset that a model draws with by default."""

from __future__ import annotations

from clear_attn.patching.target import Target
from clear_attn.weights import packaged
from clear_attn.weights.recognition import ByValues, Model

# "refined" was tried on this model alone. Distilled weights replace values of its attention layers.
SMALL_FLUX = ByValues(packaged.MODEL / "transformer", ignored=r"\.attn\.")


def default_preset(target: Target) -> str:
    """Return the name of the preset that was found best for a model, linearized or not: "published" if none was."""
    originals = target.hook.original.values if target.hook else {}
    refined = SMALL_FLUX.recognizes(Model(target.pipe, target.transformer, originals))
    return "refined" if refined else "published"
