"""Limits how often something may happen, for each address and in all. It does no I/O.

A few addresses that do all they may can use up what all of them may. An address that does little is
therefore admitted from a reserve that only such addresses have.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ADDRESSES = 10000  # that are remembered; a full table is cleared


@dataclass(frozen=True)
class Rate:
    """Allows `burst` events at once, and `per_second` in the long run."""

    per_second: float
    burst: float


# What an address may do from the reserve: a pod posts its progress every few seconds, on a
# connection that it keeps.
_FEW = Rate(per_second=2.0, burst=10.0)


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


class _Address:
    """Holds the tokens of one address."""

    def __init__(self, rate: Rate, now: float) -> None:
        self.all = _Bucket(rate, now)
        self.few = _Bucket(_FEW, now)


class Rates:
    """Counts events by address. What an address may not do costs the others nothing.

    `total` is what all may do together, and the reserve is as large again.
    """

    def __init__(self, per_address: Rate, total: Rate) -> None:
        self._per_address = per_address
        self._total = _Bucket(total, 0.0)
        self._reserve = _Bucket(total, 0.0)
        self._addresses: dict[str, _Address] = {}

    def admits(self, address: str, now: float) -> bool:
        """Whether an event of this address is within the rates; it counts if it is."""
        known = self._addresses.get(address)
        if known is None:
            if len(self._addresses) >= MAX_ADDRESSES:
                self._addresses.clear()
            known = self._addresses[address] = _Address(self._per_address, now)
        does_little = known.few.refilled(now) >= 1.0
        if does_little:
            known.few.take()
        if known.all.refilled(now) < 1.0:
            return False
        if self._total.refilled(now) >= 1.0:
            self._total.take()
        elif does_little and self._reserve.refilled(now) >= 1.0:
            self._reserve.take()
        else:
            return False
        known.all.take()
        return True
