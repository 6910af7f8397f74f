"""Seeds that follow from what they are for, so that nothing random depends on what ran before."""

from __future__ import annotations

import hashlib


def hash_of(*numbers: int) -> int:
    """One seed of several numbers: what is random at a step depends on the step alone, also after an interruption."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7])
