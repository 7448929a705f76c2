"""Watches the ranks of this node from their start until the last one has ended.

It reads events, forwards a request to stop as the stop flag, stops the ranks if they stall or one
dies, and returns what happened. A listener decides what an event means for metrics and uploads.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from finetune_api.messages import events
from finetune_trainer.errors import RunError
from finetune_trainer.host_memory import oom_kills
from finetune_trainer.log import Log
from finetune_trainer.reporting import event_reader, flight_records
from finetune_trainer.supervisor import hang_report
from finetune_trainer.supervisor.exit_reason import RankEnd, root_cause
from finetune_trainer.supervisor.node import Node
from finetune_trainer.supervisor.processes import RankProcesses, rank_specs
from finetune_trainer.supervisor.signals import StopRequest

Listener = Callable[[events.Event], None]


@dataclass(frozen=True)
class RanksEnd:
    """Says how the ranks ended.

    They are `finished` if all of them returned 0, and `stopped` if they ended, or were killed,
    after a request to stop.
    """

    how: Literal["finished", "stopped"]


class Monitor:
    """Watches one attempt's ranks on this node. `tick` is called in every round of the loop."""

    def __init__(self, node: Node, stop: StopRequest, log: Log, listener: Listener, tick: Callable[[], None]) -> None:
        self._node = node
        self._stop = stop
        self._log = log
        self._listener = listener
        self._tick = tick
        self._errors: dict[int, events.ErrorEvent] = {}
        self._has_stepped = False
        self._phase = "starting"
        self._last_activity = time.monotonic()
        self._log_bytes = 0
        self._heartbeats: dict[int, float] = {}  # rank → the time of its last heartbeat
        self._stop_forwarded = False

    def run(self) -> RanksEnd:
        """Starts the ranks and returns after the last one has ended.

        Raises RunError with the root cause if a rank dies or the ranks stall.
        """
        node, timing, world = self._node, self._node.timing, self._node.run.world
        specs = rank_specs(world, node.rank, node.paths, node.rank_command, node.rank_environment)
        self._readers = {spec.rank: event_reader.EventReader(node.paths.rank_events(spec.rank)) for spec in specs}
        kills_before = oom_kills()
        ranks = RankProcesses(specs, node.paths, self._log)
        self._log.info("ranks started", ranks=[spec.rank for spec in specs], world=world.size)
        try:
            while ranks.alive:
                ranks.poll()
                self._read_events()
                self._read_heartbeats()
                self._tick()
                if any(ranks.ended.values()):
                    return self._handle_rank_death(ranks, kills_before)
                if self._stop.requested and not self._forward_stop():
                    seconds_left = self._stop.seconds_left
                    self._log.warning("stopping the ranks without a new checkpoint", seconds_left=seconds_left)
                    if self._has_stepped and self._stop.count == 1:
                        self._dump_stacks(ranks)
                    ranks.stop(min(timing.terminate, max(0.2, self._stop.seconds_left)))
                    return RanksEnd("stopped")
                if self._is_stalled(ranks):
                    raise self._stop_stalled(ranks)
                time.sleep(timing.tick)
            ranks.drain()
            self._read_events()
            if any(ranks.ended.values()):
                return self._handle_rank_death(ranks, kills_before)
            return RanksEnd("finished")
        finally:
            ranks.stop(0)

    def _read_events(self) -> None:
        for rank, reader in self._readers.items():
            for event in reader.read():
                self._last_activity = time.monotonic()
                if isinstance(event, events.ErrorEvent):
                    self._errors.setdefault(event.rank, event)
                if isinstance(event, events.StepEvent | events.SkippedEvent):
                    self._has_stepped = True
                if isinstance(event, events.PhaseEvent):
                    self._phase = event.phase
                if rank == 0 or isinstance(event, events.CheckpointEvent):
                    self._listener(event)

    def _read_heartbeats(self) -> None:
        """Notices ranks that have touched their heartbeat file. Except on node 0, ranks report
        little else, so their phase is read from that file."""
        for rank in self._readers:
            file = self._node.paths.rank_heartbeat(rank)
            with suppress(OSError):
                heartbeat = file.stat().st_mtime
                if heartbeat != self._heartbeats.get(rank):
                    self._heartbeats[rank] = heartbeat
                    self._last_activity = time.monotonic()
                    if not self._node.leads:
                        self._phase = file.read_text() or self._phase

    def _forward_stop(self) -> bool:
        """Sets the stop flag once. Returns whether a new checkpoint can still be expected."""
        if not self._stop_forwarded:
            self._stop_forwarded = True
            self._node.paths.stop.touch()
            message = "asked to stop: a checkpoint is saved after this step"
            self._log.info(message, seconds_left=self._stop.seconds_left)
        nothing_new = self._node.leads and not self._has_stepped
        return self._stop.seconds_left > 0 and not nothing_new

    def _handle_rank_death(self, ranks: RankProcesses, kills_before: int) -> RanksEnd:
        """Handles the death of a rank.

        Waits for `settle` seconds, so that related failures are seen too, stops the other ranks,
        and raises RunError with the root cause. After a request to stop, a death is expected.
        """
        deadline = time.monotonic() + self._node.timing.settle
        while ranks.alive and time.monotonic() < deadline:
            ranks.poll()
            time.sleep(0.05)
        dead = {rank: status for rank, status in ranks.ended.items() if status != 0}
        ranks.stop(self._node.timing.terminate)
        self._read_events()
        if self._stop.requested:
            self._log.warning("a rank died after the request to stop", ended=dead)
            return RanksEnd("stopped")
        paths = self._node.paths
        ends = tuple(
            RankEnd(rank, status, self._errors.get(rank), event_reader.last_lines(paths.rank_log(rank)))
            for rank, status in dead.items()
        )
        raise root_cause(ends, oom_kills() - kills_before)

    def _is_stalled(self, ranks: RankProcesses) -> bool:
        """Returns whether no rank of this node has shown activity for stall_seconds.

        Before and after training, a growing log counts as activity too, and only node 0 judges,
        because the ranks of other nodes may wait long for rank 0.
        """
        limit = self._node.run.stall_seconds
        if limit == 0 or self._stop.requested or (self._phase != "training" and not self._node.leads):
            return False
        if self._phase != "training":
            logs = (self._node.paths.rank_log(rank) for rank in ranks.alive)
            size = sum(log.stat().st_size for log in logs if log.exists())
            if size != self._log_bytes:
                self._log_bytes = size
                self._last_activity = time.monotonic()
        return time.monotonic() - self._last_activity > limit

    def _stop_stalled(self, ranks: RankProcesses) -> RunError:
        """Stops stalled ranks and returns an error that says where they were."""
        self._node.paths.flight_request.touch()
        traces = self._dump_stacks(ranks)
        behind = self._read_flight_records(ranks)
        ranks.stop(self._node.timing.terminate)
        rank = hang_report.culprit(traces)
        trace = traces[rank]
        return RunError(
            "Stalled",
            f"no progress for runPolicy.stallSeconds={self._node.run.stall_seconds} in phase {self._phase}: "
            f"{hang_report.summary(traces)}{behind and f'; {behind}'}",
            rank=rank,
            log_tail=trace.text if trace else event_reader.last_lines(self._node.paths.rank_log(rank)),
        )

    def _read_flight_records(self, ranks: RankProcesses) -> str:
        """Logs the last collectives of each rank of this node, and returns which rank is behind.

        A rank that can't run its thread writes none; it is waited for during `settle` seconds.
        """
        files = {rank: self._node.paths.flight_record(rank) for rank in ranks.alive}
        deadline = time.monotonic() + self._node.timing.settle
        while not all(file.exists() for file in files.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        recorded = {rank: flight_records.calls(event_reader.since(file, 0)) for rank, file in files.items()}
        for rank, history in recorded.items():
            self._log.warning("last collectives", rank=rank, calls=flight_records.last_calls(history))
        return flight_records.summary({rank: history for rank, history in recorded.items() if history})

    def _dump_stacks(self, ranks: RankProcesses) -> dict[int, hang_report.StackTrace | None]:
        """Returns the stack of each rank of this node, None if it printed none.

        On SIGUSR1 a rank prints its stacks, which are then in its log too.
        """
        logs = {rank: self._node.paths.rank_log(rank) for rank in ranks.alive}
        before = {rank: log.stat().st_size if log.exists() else 0 for rank, log in logs.items()}
        ranks.signal(signal.SIGUSR1)
        time.sleep(min(1.0, self._node.timing.settle))
        return {rank: hang_report.stack_trace(event_reader.since(log, before[rank])) for rank, log in logs.items()}
