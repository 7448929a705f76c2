"""Seeds that are a pure function of what they are for, so that no random state has to be carried through a restart."""

from __future__ import annotations

import hashlib


def mix(seed: int, *parts: int | str) -> int:
    """63 bits out of the job's seed and a place in the run, e.g. mix(42, "dropout", step, micro, rank)."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
