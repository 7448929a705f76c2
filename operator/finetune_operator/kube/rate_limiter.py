"""Limits the rate of requests to the API server by a token bucket with priorities.

Urgent requests, such as the creation of pods, overtake ordinary ones, such as status writes.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from typing import Final

URGENT: Final = 0
ORDINARY: Final = 1


class RateLimiter:
    """Admits `burst` requests immediately and `rate` requests per second in the long run."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._tokens = float(burst)
        self._refilled_at = 0.0
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, priority: int = ORDINARY) -> None:
        """Waits until the request may be sent."""
        loop = asyncio.get_running_loop()
        self._refill(loop.time())
        if not self._waiters and self._tokens >= 1.0:
            self._tokens -= 1.0
            return
        admitted: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiters, (priority, next(self._order), admitted))
        self._set_timer(loop)
        await admitted

    def _refill(self, now: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now - self._refilled_at) * self._rate)
        self._refilled_at = now

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None and self._waiters:
            self._timer = loop.call_later(max(0.0, (1.0 - self._tokens) / self._rate), self._admit, loop)

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        """Admits as many waiting requests as there are tokens, the most urgent first."""
        self._timer = None
        self._refill(loop.time())
        while self._waiters and self._tokens >= 1.0:
            _, _, admitted = heapq.heappop(self._waiters)
            if not admitted.done():
                admitted.set_result(None)
                self._tokens -= 1.0
        self._set_timer(loop)
