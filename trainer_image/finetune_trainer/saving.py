"""Checkpoints while training goes on: the loop hands over copies, and a thread of rank 0 writes them. Used by the loop.

At most one is on its way: the next one waits for it, so that no more than one copy is held. What goes wrong in the
thread is raised by the next save, or at the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from torch import Tensor

from finetune_api import events
from finetune_api.run import JobRef
from finetune_trainer import checkpoint, selection
from finetune_trainer.checkpoint import State
from finetune_trainer.learner import Learner
from finetune_trainer.reporter import Reporter
from finetune_trainer.selection import Cadence
from finetune_trainer.world import World


@dataclass
class Saver:
    """Of a run; one rank each. Leaving it waits for what is being written. `best`: the best weights' file, or None."""

    world: World
    learner: Learner
    reporter: Reporter
    folder: Path
    job: JobRef
    cadence: Cadence
    best: Path | None
    kept: int
    _pending: Future[None] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _began: float = field(default_factory=time.monotonic)
    _last: float = field(default_factory=time.monotonic)
    _stalled: float = 0.0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
        finally:
            self._thread.shutdown()

    def due(self, step: int, total: int) -> bool:
        """Rank 0's word; the others have none. When is up to its clock, what is saved is not."""
        now = time.monotonic()
        return self.world.is_first and selection.is_checkpoint_step(
            self.cadence, step, total, since=now - self._last, stalled=self._stalled, elapsed=now - self._began
        )

    def save(self, state: State) -> None:
        """Gathers on all ranks; returns once rank 0 has copies."""
        began = time.monotonic()
        self.wait()
        weights, moments = self.learner.weights(), self.learner.moments()
        if not self.world.is_first:
            return
        best = self.best if state.best is not None and state.best.step != state.step else None
        aside = checkpoint.begin(self.folder, state.step, best)
        stall = time.monotonic() - began
        self._pending = self._thread.submit(self._write, aside, state, weights, moments, began, stall)
        self._last = time.monotonic()
        self._stalled += stall

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong there."""
        pending, self._pending = self._pending, None
        while pending is not None and not pending.done():
            self.reporter.alive()
            wait((pending,), timeout=1)
        if pending is not None:
            pending.result()

    def _write(
        self,
        aside: Path,
        state: State,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        began: float,
        stall: float,
    ) -> None:
        folder = checkpoint.save(aside, state, weights=weights, moments=moments, job=self.job, keep=self.kept)
        self.reporter.report(
            events.CheckpointEvent,
            step=state.step,
            path=str(folder),
            seconds=time.monotonic() - began,
            stall_seconds=stall,
            bytes=checkpoint.size(folder),
        )
