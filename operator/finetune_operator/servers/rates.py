"""Limits how often something may happen, for each address and in all. It does no I/O."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ADDRESSES = 10000  # that are remembered; a full table is cleared


@dataclass(frozen=True)
class Rate:
    """Allows `burst` events at once, and `per_second` in the long run."""

    per_second: float
    burst: float


class _Bucket:
    """Holds the tokens of one rate."""

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._tokens = rate.burst
        self._refilled_at = now

    def refilled(self, now: float) -> float:
        """Returns the tokens that there are now (a time in seconds that never decreases)."""
        elapsed = max(0.0, now - self._refilled_at)
        self._tokens = min(self._rate.burst, self._tokens + elapsed * self._rate.per_second)
        self._refilled_at = now
        return self._tokens

    def take(self) -> None:
        """Takes one token."""
        self._tokens -= 1.0


class Rates:
    """Counts events by address. What an address may not do costs the others nothing."""

    def __init__(self, per_address: Rate, total: Rate) -> None:
        self._per_address = per_address
        self._total = _Bucket(total, 0.0)
        self._addresses: dict[str, _Bucket] = {}

    def admits(self, address: str, now: float) -> bool:
        """Whether an event of this address is within both rates; it counts if it is."""
        bucket = self._addresses.get(address)
        if bucket is None:
            if len(self._addresses) >= MAX_ADDRESSES:
                self._addresses.clear()
            bucket = self._addresses[address] = _Bucket(self._per_address, now)
        if bucket.refilled(now) < 1.0 or self._total.refilled(now) < 1.0:
            return False
        bucket.take()
        self._total.take()
        return True
