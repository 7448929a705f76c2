"""queue: which FineTuneJobs want a look, at most one worker a job at a time.

Filled by doors, the sweep, progress and timers; emptied by the workers of reconcile. Never looks at a job itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.cache import Key

_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True)
class _Timer:
    due: float  # of the event loop's clock
    handle: asyncio.TimerHandle


class Queue:
    """A key that is added while it is worked on is worked on once more afterwards; never twice at once."""

    def __init__(self, observe_wait: Callable[[float], None] = lambda _: None) -> None:
        self._waiting: deque[Key] = deque()
        self._since: dict[Key, float] = {}  # keys in _waiting
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, _Timer] = {}
        self._failures: dict[Key, int] = {}
        self._filled = asyncio.Event()
        self._observe_wait = observe_wait

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Key) -> None:
        if key in self._busy:
            self._again.add(key)
        elif key not in self._since:
            self._since[key] = time.monotonic()
            self._waiting.append(key)
            self._filled.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Adds the key later; the earliest of several timers stays."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        known = self._timers.get(key)
        if known and known.due <= due:
            return
        if known:
            known.handle.cancel()
        self._timers[key] = _Timer(due, loop.call_at(due, self._ring, key))

    async def take(self) -> Key:
        """The next key; `done` has to be called for it."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        key = self._waiting.popleft()
        self._observe_wait(time.monotonic() - self._since.pop(key))
        self._busy.add(key)
        return key

    def done(self, key: Key) -> None:
        """The key was worked on."""
        self._busy.discard(key)
        self._failures.pop(key, None)
        self._add_again(key)

    def failed(self, key: Key) -> float:
        """The key has to be tried again, each time later. Returns the delay in seconds."""
        self._busy.discard(key)
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        longest = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16), _LONGEST_BACKOFF_SECONDS)
        delay = longest * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        self._again.discard(key)
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """The job is gone: no timer for it."""
        timer = self._timers.pop(key, None)
        if timer:
            timer.handle.cancel()
        self._failures.pop(key, None)

    def _ring(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _add_again(self, key: Key) -> None:
        if key in self._again:
            self._again.discard(key)
            self.add(key)
