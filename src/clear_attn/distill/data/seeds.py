"""Seeds that depend only on their purpose, not on earlier steps of the run."""

from __future__ import annotations

import hashlib


def hash_of(*parts: int | str) -> int:
    """Return a seed computed from several parts, such as the run's seed and a step."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
