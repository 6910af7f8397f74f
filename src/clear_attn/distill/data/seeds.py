"""Seeds that depend only on their purpose, not on what ran before."""

from __future__ import annotations

import hashlib


def hash_of(*parts: int | str) -> int:
    """Return a seed of several parts, such as the run's seed and a step: the same after an interruption."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
