"""Watches the ranks until they have ended, one way or another. The supervisor's inner loop.

It reads events, forwards a request to stop as the stop flag, ends a stalled or bereaved group, and gives back what
happened. What the events mean for metrics and uploads is the listener's, given by the supervisor.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from finetune_api import events
from finetune_trainer import stacks, tail
from finetune_trainer.classify import RankEnd, root_cause
from finetune_trainer.failure import Failed
from finetune_trainer.log import Log
from finetune_trainer.memory import oom_kills
from finetune_trainer.node import Node
from finetune_trainer.ranks import Ranks, rank_specs
from finetune_trainer.stopping import StopRequest

Listener = Callable[[events.Event], None]


@dataclass(frozen=True)
class Ended:
    """`finished`: all ranks returned 0. `stopped`: they were told to leave, and left or were killed."""

    how: Literal["finished", "stopped"]


class Watch:
    """One attempt's ranks on this node."""

    def __init__(self, node: Node, stop: StopRequest, log: Log, listener: Listener, tick: Callable[[], None]) -> None:
        self._node = node
        self._stop = stop
        self._log = log
        self._listener = listener
        self._tick = tick
        self._errors: dict[int, events.ErrorEvent] = {}
        self._stepped = False
        self._phase = "starting"
        self._sign = time.monotonic()
        self._log_bytes = 0
        self._beats: dict[int, float] = {}
        self._flagged = False

    def run(self) -> Ended:
        """Starts the ranks and returns when none is left. Raises Failed with the root cause."""
        node, timing, world = self._node, self._node.timing, self._node.run.world
        specs = rank_specs(world, node.rank, node.paths, node.rank_command, node.rank_environment)
        self._tails = {spec.rank: tail.Tail(node.paths.rank_events(spec.rank)) for spec in specs}
        kills_before = oom_kills()
        ranks = Ranks(specs, node.paths, self._log)
        self._log.info("ranks started", ranks=[spec.rank for spec in specs], world=world.size)
        try:
            while ranks.alive:
                ranks.poll()
                self._read_events()
                self._feel_beats()
                self._tick()
                if any(ranks.ended.values()):
                    return self._bereaved(ranks, kills_before)
                if self._stop.asked and not self._may_go_on():
                    self._log.warning("the ranks are ended without a new checkpoint", seconds_left=self._stop.left)
                    if self._stepped and self._stop.count == 1:
                        self._places(ranks)
                    ranks.stop(min(timing.terminate, max(0.2, self._stop.left)))
                    return Ended("stopped")
                if self._stalled(ranks):
                    raise self._stall(ranks)
                time.sleep(timing.tick)
            ranks.drain()
            self._read_events()
            if any(ranks.ended.values()):
                return self._bereaved(ranks, kills_before)
            return Ended("finished")
        finally:
            ranks.stop(0)

    def _read_events(self) -> None:
        for rank, reader in self._tails.items():
            for event in reader.read():
                self._sign = time.monotonic()
                if isinstance(event, events.ErrorEvent):
                    self._errors.setdefault(event.rank, event)
                if isinstance(event, events.StepEvent | events.SkippedEvent):
                    self._stepped = True
                if isinstance(event, events.PhaseEvent):
                    self._phase = event.phase
                if rank == 0 or isinstance(event, events.CheckpointEvent):
                    self._listener(event)

    def _feel_beats(self) -> None:
        """Each rank of this node touches a file while it gets on; only node 0 hears more of its ranks than that."""
        for rank in self._tails:
            file = self._node.paths.rank_alive(rank)
            with suppress(OSError):
                beat = file.stat().st_mtime
                if beat != self._beats.get(rank):
                    self._beats[rank] = beat
                    self._sign = time.monotonic()
                    if not self._node.leads:
                        self._phase = file.read_text() or self._phase

    def _may_go_on(self) -> bool:
        """Forwards the request to stop. False when nothing is gained by waiting any longer."""
        if not self._flagged:
            self._flagged = True
            self._node.paths.stop.touch()
            self._log.info("asked to stop: a checkpoint is saved after this step", seconds_left=self._stop.left)
        nothing_new = self._node.leads and not self._stepped
        return self._stop.left > 0 and not nothing_new

    def _bereaved(self, ranks: Ranks, kills_before: int) -> Ended:
        """A rank died. The others get a moment to die of it, so that the cause is seen, and are ended then."""
        deadline = time.monotonic() + self._node.timing.settle
        while ranks.alive and time.monotonic() < deadline:
            ranks.poll()
            time.sleep(0.05)
        dead = {rank: status for rank, status in ranks.ended.items() if status != 0}
        ranks.stop(self._node.timing.terminate)
        self._read_events()
        if self._stop.asked:
            self._log.warning("a rank died while the group was asked to leave", ended=dead)
            return Ended("stopped")
        paths = self._node.paths
        ends = tuple(
            RankEnd(rank, status, self._errors.get(rank), tail.last_lines(paths.rank_log(rank)))
            for rank, status in dead.items()
        )
        raise root_cause(ends, oom_kills() - kills_before)

    def _stalled(self, ranks: Ranks) -> bool:
        """No sign of life of any rank here for stall_seconds. Outside the steps a growing log is one too, and only node
        0 judges: there the other ranks may wait long for rank 0."""
        limit = self._node.run.stall_seconds
        if limit == 0 or self._stop.asked or (self._phase != "training" and not self._node.leads):
            return False
        if self._phase != "training":
            logs = (self._node.paths.rank_log(rank) for rank in ranks.alive)
            size = sum(log.stat().st_size for log in logs if log.exists())
            if size != self._log_bytes:
                self._log_bytes = size
                self._sign = time.monotonic()
        return time.monotonic() - self._sign > limit

    def _stall(self, ranks: Ranks) -> Failed:
        """Asks the ranks where they are, ends them, and tells."""
        places = self._places(ranks)
        ranks.stop(self._node.timing.terminate)
        rank = stacks.culprit(places)
        at = places[rank]
        return Failed(
            "Stalled",
            f"nothing happened for runPolicy.stallSeconds={self._node.run.stall_seconds} in phase {self._phase}: "
            f"{stacks.told(places)}",
            rank=rank,
            log_tail=at.text if at else tail.last_lines(self._node.paths.rank_log(rank)),
        )

    def _places(self, ranks: Ranks) -> dict[int, stacks.Place | None]:
        """Where each rank of this node is: on SIGUSR1 they print their stacks, which then stand in the log too."""
        logs = {rank: self._node.paths.rank_log(rank) for rank in ranks.alive}
        before = {rank: log.stat().st_size if log.exists() else 0 for rank, log in logs.items()}
        ranks.signal(signal.SIGUSR1)
        time.sleep(min(1.0, self._node.timing.settle))
        return {rank: stacks.place(tail.since(log, before[rank])) for rank, log in logs.items()}
