"""The small FLUX in this package, and its distilled weights, which `weights="auto"` takes for it."""

from __future__ import annotations

from pathlib import Path

# The name for it where a model is named.
NAME = "demo"
MODEL = Path(__file__).parents[1] / "demo" / "small_flux"
WEIGHTS = Path(__file__).parents[1] / "demo" / "small_flux_clear"


def resolve_name(model: str) -> str:
    """Return the folder of the small FLUX for its name, and any other folder or Hub id as it is."""
    return str(MODEL) if model == NAME else model
