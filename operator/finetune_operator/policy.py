"""policy: whether, and when, a failed attempt is followed by another one.

Called by decide. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.reasons import REASONS, Cause
from finetune_api.resource import MaxRestartsSpec
from finetune_api.status import Restarts

_FIRST_DELAY_SECONDS = 10.0
_LONGEST_DELAY_SECONDS = 300.0
_LONG_LIFE_SECONDS = 600.0  # an attempt that lived this long starts a new count of delays


@dataclass(frozen=True)
class Restart:
    """Another attempt, `delay` seconds after the last one's end, with the counters that it then has."""

    restarts: Restarts
    delay: float


@dataclass(frozen=True)
class GiveUp:
    """No other attempt. `budget` is what was spent, where a retry would have made sense."""

    budget: int | None = None


def next_attempt(cause: Cause, restarts: Restarts, budget: MaxRestartsSpec, lived: float) -> Restart | GiveUp:
    """A user's mistake is never retried, a preemption always; the others have a budget each.

    `lived` is how long the attempt existed, in seconds.
    """
    if cause == "user":
        return GiveUp()
    allowed = {
        "application": budget.application,
        "infrastructure": budget.infrastructure,
        "preemption": None,
    }[cause]
    if allowed is not None and getattr(restarts, cause) >= allowed:
        return GiveUp(allowed)
    counted = restarts.model_copy(update={cause: getattr(restarts, cause) + 1})
    return Restart(counted, _delay(total(counted), lived))


def total(restarts: Restarts) -> int:
    """Restarts of all causes."""
    return restarts.application + restarts.infrastructure + restarts.preemption


def _delay(restart: int, lived: float) -> float:
    """The first restart comes at once, and so does one after a long life; then 10, 20, 40 … 300 s."""
    if restart <= 1 or lived >= _LONG_LIFE_SECONDS:
        return 0.0
    return min(_FIRST_DELAY_SECONDS * 2.0 ** min(restart - 2, 10), _LONGEST_DELAY_SECONDS)


def hint(reason: str) -> str:
    """What a person can do about a reason."""
    known = REASONS.get(reason)
    return known.hint if known else ""
