"""Seeds that follow from what they are for, so that nothing random depends on what ran before."""

from __future__ import annotations

import hashlib


def hash_of(*parts: int | str) -> int:
    """One seed of several parts: what is random at a step depends on the step alone, also after an interruption."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
