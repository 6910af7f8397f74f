"""What training holds, counted from the numbers of parameters."""

from __future__ import annotations

from clear_attn.distill.optimizers import SLICE

# Values that an optimizer keeps for each parameter; in float32, but for adamw8bit.
STATES = {"adamw": 2.0, "prodigy": 2 + 2 / SLICE, "adamw8bit": 0.5}


def counted(trunk: int, student: int, optimizer: str) -> dict[str, float]:
    """Bytes of each part, but for activations.

    Args:
        trunk: parameters of the transformer, kept in bfloat16.
        student: parameters that are trained, in float32.
        optimizer: its name.
    """
    return {
        "trunk, bfloat16": 2 * trunk,
        "student, float32": 4 * student,
        "its gradient, float32": 4 * student,
        f"{optimizer}'s states": 4 * student * STATES[optimizer],
        "autocast's copies, bfloat16": 2 * student,
    }
