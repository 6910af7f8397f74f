"""What the trainings of the small FLUX share: randomness of a step, saved states, progress."""

import time
from pathlib import Path
from typing import Any

import torch

from clear_attn.utils.atomic import atomic_file

SAVE_EVERY = 180  # seconds


def generator_of(seed: int, purpose: int, step: int) -> torch.Generator:
    """Return the randomness of a step."""
    return torch.Generator().manual_seed((seed * 16 + purpose) * 2**24 + step)


def save_state(file: Path, **state: Any) -> None:
    with atomic_file(file) as unfinished:
        torch.save(state, unfinished)


def load_state(file: Path) -> dict[str, Any]:
    """Return what was saved, or nothing."""
    return torch.load(file, weights_only=True) if file.exists() else {}


def report(name: str, step: int, steps: int, loss: float, started: float) -> None:
    """Print the progress, the seconds of this sitting, and those of all cores."""
    seconds, cores = time.monotonic() - started, time.process_time()
    print(f"{name} {step + 1}/{steps} loss {loss:.4f} {seconds:.0f} s, {cores:.0f} core s", flush=True)
