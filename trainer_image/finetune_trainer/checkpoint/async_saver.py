"""Saves checkpoints while training continues: the loop copies the tensors, and a thread writes the
copies.

If checkpoints are gathered, rank 0 has all copies and the thread. If they are sharded, every rank
has its own, and the first rank of each node completes the node's folder once all ranks of the node
have written theirs. The next save waits for the previous one to finish, so that there is never more
than one copy. An error in the thread is raised by the next save, or at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from finetune_api.messages import events
from finetune_api.messages.run import JobRef
from finetune_trainer.checkpoint import local_folder
from finetune_trainer.checkpoint.best_weights import BestWeights
from finetune_trainer.checkpoint.cadence import Cadence, is_checkpoint_step
from finetune_trainer.checkpoint.sharded import Sharding
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.parallel.strategy import ParallelStrategy
from finetune_trainer.parallel.world import World
from finetune_trainer.reporting.event_writer import EventWriter


@dataclass
class Saver:
    """Saves the checkpoints of a run; every rank has one. As a context manager, it waits on exit
    until nothing is being written.

    `best` is None if the best weights aren't tracked. Only the last `keep` checkpoints stay on
    disk. `sharding` is None if checkpoints are gathered.
    """

    world: World
    strategy: ParallelStrategy
    reporter: EventWriter
    folder: Path
    job: JobRef
    cadence: Cadence
    best: BestWeights | None
    keep: int
    sharding: Sharding | None = None
    _pending: Future[None] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _started: float = field(default_factory=time.monotonic)
    _last_save: float = field(default_factory=time.monotonic)
    _stalled: float = 0.0

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
        finally:
            self._thread.shutdown()

    def due(self, step: int, total: int) -> bool:
        """Returns whether a checkpoint is due after this step. Rank 0 decides; other ranks return
        False.

        Its clock decides only when a checkpoint is saved, not what it contains.
        """
        now = time.monotonic()
        return self.world.is_first and is_checkpoint_step(
            self.cadence,
            step,
            total,
            since=now - self._last_save,
            stalled=self._stalled,
            elapsed=now - self._started,
        )

    def save(self, state: CheckpointState) -> None:
        """Saves a checkpoint; all ranks must call it. It returns as soon as the ranks that write
        have their copies."""
        start = time.monotonic()
        self.wait()
        write = self._gathered(state) if self.sharding is None else self._sharded(state, self.sharding)
        stall = time.monotonic() - start
        if write is not None:
            self._pending = self._thread.submit(self._write, write, state.step, start, stall)
        self._last_save = time.monotonic()
        self._stalled += stall

    def wait(self) -> None:
        """Waits until nothing is being written. Raises the thread's error, if any."""
        pending, self._pending = self._pending, None
        while pending is not None and not pending.done():
            self.reporter.heartbeat()
            wait((pending,), timeout=1)
        if pending is not None:
            pending.result()

    def _gathered(self, state: CheckpointState) -> Callable[[], Path | None] | None:
        """Gathers the tensors, in which all ranks take part.

        Returns a function that writes them on rank 0, and None on the other ranks.
        """
        weights, moments = self.strategy.weights(), self.strategy.optimizer_state()
        if not self.world.is_first:
            return None
        partial = local_folder.begin(self.folder, state.step)
        self._link_best(state, partial)
        return lambda: local_folder.save(partial, state, weights=weights, moments=moments, job=self.job, keep=self.keep)

    def _sharded(self, state: CheckpointState, sharding: Sharding) -> Callable[[], Path | None]:
        """Copies this rank's parts and returns a function that writes them. On the first rank of a
        node, the function also completes the folder."""
        own = {"weights": sharding.strategy.own_weights()}
        if state.updates:
            own["optimizer"] = sharding.strategy.own_optimizer_state()
        if self.world.is_first_of_node:
            local_folder.begin(self.folder, state.step)
        self.world.barrier()
        partial = local_folder.partial_folder(self.folder, state.step)
        best = self._link_best(state, partial)
        part = local_folder.Part(self.world.rank, self.world.node_ranks, sharding.index, own, best)
        return lambda: local_folder.save_part(partial, state, part, job=self.job, keep=self.keep)

    def _link_best(self, state: CheckpointState, partial: Path) -> Path | None:
        """Links the file of the best weights immediately, since it may soon be replaced.

        Returns the link. Returns None if there are no best weights, if they are the ones that are
        being saved, or if this rank has no file.
        """
        if self.best is None or state.best is None or state.best.step == state.step:
            return None
        return self.best.link(partial)

    def _write(self, write: Callable[[], Path | None], step: int, start: float, stall: float) -> None:
        """Writes in the thread, and reports the checkpoint if this rank completed it."""
        folder = write()
        if folder is None:
            return
        self.reporter.report_of_node(
            events.CheckpointEvent,
            step=step,
            path=str(folder),
            seconds=time.monotonic() - start,
            stall_seconds=stall,
            bytes=local_folder.size(folder),
        )
