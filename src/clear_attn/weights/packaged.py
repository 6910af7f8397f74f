"""The small FLUX in this package, and its distilled weights, which `weights="auto"` takes for it."""

from __future__ import annotations

import re
from pathlib import Path

from clear_attn.weights.hub import HUB_ID

# The name for it where a model is named.
NAME = "demo"
MODEL = Path(__file__).parents[1] / "demo" / "small_flux"
WEIGHTS = Path(__file__).parents[1] / "demo" / "small_flux_clear"
# The folder in WEIGHTS for each window and down_factor.
FOLDERS = {(8, 1): "window_8", (4, 1): "window_4", (16, 1): "window_16", (8, 4): "window_8_down_4"}


def resolve_name(model: str) -> str:
    """Return the folder of the small FLUX for its name, and any other folder or Hub id as it is.

    Raises:
        FileNotFoundError: it is neither a folder that exists nor of the form of a Hub id.
    """
    if model == NAME:
        return str(MODEL)
    if not Path(model).exists() and not re.fullmatch(HUB_ID, model):
        raise FileNotFoundError(f"{model} does not exist; give a folder, a Hub id (owner/repo) or {NAME}")
    return model
