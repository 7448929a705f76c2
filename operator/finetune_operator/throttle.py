"""throttle: a token bucket in front of the API server, in which the creation of pods goes before status.

Used by cluster alone.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from typing import Final

URGENT: Final = 0
ORDINARY: Final = 1


class Throttle:
    """`burst` requests at once, `rate` a second in the long run."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._tokens = float(burst)
        self._filled_at = 0.0
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._alarm: asyncio.TimerHandle | None = None

    async def acquire(self, priority: int = ORDINARY) -> None:
        """Returns when the request may be sent."""
        loop = asyncio.get_running_loop()
        self._refill(loop.time())
        if not self._waiters and self._tokens >= 1.0:
            self._tokens -= 1.0
            return
        turn: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiters, (priority, next(self._order), turn))
        self._set_alarm(loop)
        await turn

    def _refill(self, now: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now

    def _set_alarm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._alarm is None and self._waiters:
            self._alarm = loop.call_later(max(0.0, (1.0 - self._tokens) / self._rate), self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._alarm = None
        self._refill(loop.time())
        while self._waiters and self._tokens >= 1.0:
            _, _, turn = heapq.heappop(self._waiters)
            if not turn.done():
                turn.set_result(None)
                self._tokens -= 1.0
        self._set_alarm(loop)
