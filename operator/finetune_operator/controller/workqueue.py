"""Queues the keys of FineTuneJobs to reconcile, so that at most one worker has a job at a time.

Namespaces take turns, so that one with very many jobs doesn't delay those of others. It knows
nothing about a job except its key.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.controller.snapshot import Key

_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True)
class _Timer:
    """Holds a timer that queues a key later."""

    due: float  # in the event loop's time
    handle: asyncio.TimerHandle


class BrokenInvariant(Exception):
    """Is raised if the operator contradicts itself, which ends the process. No input causes it."""


class WorkQueue:
    """Hands out each key to one worker at a time.

    A key that is added while a worker has it is handed out once more when that worker is done.
    """

    def __init__(self, observe_wait: Callable[[float], None] = lambda _: None) -> None:
        self._queues: dict[str, deque[Key]] = {}  # by namespace, the one whose turn is next first; none is empty
        self._queued_at: dict[Key, float] = {}  # keys in _queues
        self._busy: set[Key] = set()
        self._requeue: set[Key] = set()
        self._timers: dict[Key, _Timer] = {}
        self._failures: dict[Key, int] = {}
        self._filled = asyncio.Event()
        self._observe_wait = observe_wait

    def __len__(self) -> int:
        return len(self._queued_at)

    def add(self, key: Key) -> None:
        """Queues the key unless it is queued already."""
        if key in self._busy:
            self._requeue.add(key)
        elif key not in self._queued_at:
            self._queued_at[key] = time.monotonic()
            self._queues.setdefault(key[0], deque()).append(key)
            self._filled.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Queues the key after a delay; of several timers, only the earliest is kept."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        timer = self._timers.get(key)
        if timer and timer.due <= due:
            return
        if timer:
            timer.handle.cancel()
        self._timers[key] = _Timer(due, loop.call_at(due, self._fire, key))

    async def take(self) -> Key:
        """Waits for the next key; `done` or `failed` has to be called for it afterwards."""
        while not self._queues:
            self._filled.clear()
            await self._filled.wait()
        namespace = next(iter(self._queues))
        rest = self._queues.pop(namespace)
        key = rest.popleft()
        if rest:
            self._queues[namespace] = rest  # behind all others
        self._observe_wait(time.monotonic() - self._queued_at.pop(key))
        self._busy.add(key)
        return key

    def done(self, key: Key) -> None:
        """Reports that the key was reconciled. Raises BrokenInvariant if no worker had it."""
        self._release(key)
        self._failures.pop(key, None)
        self._add_if_requeued(key)

    def failed(self, key: Key) -> float:
        """Requeues the key with exponential back-off. Returns the delay in seconds."""
        self._release(key)
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        longest = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16), _LONGEST_BACKOFF_SECONDS)
        delay = longest * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        self._requeue.discard(key)
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """Cancels the timer of a job that is gone."""
        timer = self._timers.pop(key, None)
        if timer:
            timer.handle.cancel()
        self._failures.pop(key, None)

    def _release(self, key: Key) -> None:
        if key not in self._busy:
            raise BrokenInvariant(f"no worker has {key}")
        self._busy.discard(key)

    def _fire(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _add_if_requeued(self, key: Key) -> None:
        if key in self._requeue:
            self._requeue.discard(key)
            self.add(key)


class WriteTurns:
    """Limits how many jobs write their status at the same time.

    An overloaded API server answers late. What it gets then are the pods of new jobs, not each
    phase of those before: a job whose turn it isn't is reconciled again when it is, and writes what
    its status is by then. On an idle API server, nobody ever waits.
    """

    def __init__(self, queue: WorkQueue, limit: int) -> None:
        self._queue = queue
        self._limit = limit
        self._writing = 0
        self._waiting: dict[Key, None] = {}  # in the order of their turns

    def begin(self, key: Key) -> bool:
        """Returns whether a job may write now; `end` has to be called for it afterwards. Otherwise,
        it is queued again."""
        if self._writing >= self._limit:
            self._waiting[key] = None
            return False
        self._waiting.pop(key, None)
        self._writing += 1
        return True

    def end(self) -> None:
        """Reports that a job has written."""
        self._writing -= 1

    def next(self) -> None:
        """Queues the next job that waits, if it may write. Call it after each reconcile, since the
        job whose turn it was may have had nothing to write any more."""
        if self._waiting and self._writing < self._limit:
            key = next(iter(self._waiting))
            del self._waiting[key]
            self._queue.add(key)

    def forget(self, key: Key) -> None:
        """Removes a job that is gone."""
        self._waiting.pop(key, None)
