"""Derives seeds as a pure function of their purpose, so no random state must survive a restart."""

from __future__ import annotations

import hashlib


def mix(seed: int, *parts: int | str) -> int:
    """Returns a 63-bit seed derived from the job's seed and a purpose within the run, for example
    mix(42, "dropout", step, micro_batch, rank)."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
