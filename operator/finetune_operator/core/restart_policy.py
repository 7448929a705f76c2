"""Decides whether, and when, another attempt follows a failed one. It does no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.reasons import Cause
from finetune_api.resource import MaxRestartsSpec
from finetune_api.status import Restarts
from finetune_api.untrusted import MAX_INTEGER

_FIRST_DELAY_SECONDS = 10.0
_LONGEST_DELAY_SECONDS = 300.0
_RESET_SECONDS = 600.0  # an attempt that lasted this long resets the back-off


@dataclass(frozen=True)
class Restart:
    """Says that another attempt starts `delay` seconds after the last one, with these counters."""

    restarts: Restarts
    delay: float


@dataclass(frozen=True)
class GiveUp:
    """Says that no attempt follows; `budget` is the exhausted one, None if a retry can't help."""

    budget: int | None = None


def next_attempt(cause: Cause, restarts: Restarts, budget: MaxRestartsSpec, lifetime: float) -> Restart | GiveUp:
    """Decides whether a failed attempt is retried.

    A user's mistake is never retried; the other causes have a budget each. `lifetime` is how long
    the attempt existed, in seconds.
    """
    if cause == "user":
        return GiveUp()
    limit: int = getattr(budget, cause)
    if getattr(restarts, cause) >= limit:
        return GiveUp(limit)
    new_restarts = restarts.model_copy(update={cause: getattr(restarts, cause) + 1})
    return Restart(new_restarts, _delay(total(new_restarts), lifetime))


def total(restarts: Restarts) -> int:
    """Returns the number of restarts of all causes."""
    counts = (restarts.application, restarts.memory, restarts.infrastructure, restarts.preemption)
    return min(sum(counts), MAX_INTEGER)  # somebody may have written any counts into an annotation


def _delay(restart: int, lifetime: float) -> float:
    """Returns the back-off: 0 s at first and after a long attempt, then 10, 20, 40 … 300 s."""
    if restart <= 1 or lifetime >= _RESET_SECONDS:
        return 0.0
    return min(_FIRST_DELAY_SECONDS * 2.0 ** min(restart - 2, 10), _LONGEST_DELAY_SECONDS)
