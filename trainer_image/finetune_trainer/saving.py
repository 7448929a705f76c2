"""Checkpoints while training goes on: the loop hands over copies, and a thread writes them. Used by the loop.

Gathered: rank 0 has all copies and the thread. In shards: every rank has its own, and the first rank of each node
completes the node's folder once all of its ranks have written theirs. At most one is on its way: the next one waits for
it, so that no more than one copy is held. What goes wrong in the thread is raised by the next save, or at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from finetune_api import events
from finetune_api.run import JobRef
from finetune_trainer import checkpoint, selection
from finetune_trainer.best import BestWeights
from finetune_trainer.checkpoint import State
from finetune_trainer.learner import Learner
from finetune_trainer.reporter import Reporter
from finetune_trainer.selection import Cadence
from finetune_trainer.shards import Sharding
from finetune_trainer.world import World


@dataclass
class Saver:
    """Of a run; one rank each. Leaving it waits for what is being written. `best`: None where they aren't kept."""

    world: World
    learner: Learner
    reporter: Reporter
    folder: Path
    job: JobRef
    cadence: Cadence
    best: BestWeights | None
    kept: int
    sharding: Sharding | None = None
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
        """Called by all ranks; returns once those who write have copies."""
        began = time.monotonic()
        self.wait()
        write = self._whole(state) if self.sharding is None else self._part(state, self.sharding)
        stall = time.monotonic() - began
        if write is not None:
            self._pending = self._thread.submit(self._write, write, state.step, began, stall)
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

    def _whole(self, state: State) -> Callable[[], Path | None] | None:
        """Gathers on all ranks; only rank 0 writes."""
        weights, moments = self.learner.weights(), self.learner.moments()
        if not self.world.is_first:
            return None
        aside = checkpoint.begin(self.folder, state.step)
        self._link_best(state, aside)
        return lambda: checkpoint.save(aside, state, weights=weights, moments=moments, job=self.job, keep=self.kept)

    def _part(self, state: State, sharding: Sharding) -> Callable[[], Path | None]:
        """Every rank writes. The first one of a node also completes its folder."""
        own = {"weights": sharding.learner.own_weights()}
        if state.updates:
            own["optimizer"] = sharding.learner.own_moments()
        if self.world.is_first_of_node:
            checkpoint.begin(self.folder, state.step)
        self.world.wait()
        aside = checkpoint.aside_of(self.folder, state.step)
        best = self._link_best(state, aside)
        part = checkpoint.Part(self.world.rank, self.world.ranks_here, sharding.index, own, best)
        return lambda: checkpoint.save_part(aside, state, part, job=self.job, keep=self.kept)

    def _link_best(self, state: State, aside: Path) -> Path | None:
        """At once, since the file may be replaced soon; not where the best weights are the ones that are saved."""
        if self.best is None or state.best is None or state.best.step == state.step:
            return None
        return self.best.link(aside)

    def _write(self, write: Callable[[], Path | None], step: int, began: float, stall: float) -> None:
        folder = write()
        if folder is None:
            return
        self.reporter.report_of_node(
            events.CheckpointEvent,
            step=step,
            path=str(folder),
            seconds=time.monotonic() - began,
            stall_seconds=stall,
            bytes=checkpoint.size(folder),
        )
