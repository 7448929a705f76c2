"""Why the ranks of a node ended: the dead, what they said, and the memory controller's counter → one reason. Pure.

Asked once by the supervisor, after the first rank has died and the others have had a moment to die of it too.
The word must be the root cause: peers of a dead rank die of broken connections, which says nothing.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from finetune_api.events import ErrorEvent
from finetune_api.reasons import REASONS
from finetune_trainer.failure import Failed


@dataclass(frozen=True)
class RankEnd:
    """A rank that ended before anybody here told it to. `status` is as subprocess gives it: below 0 is a signal."""

    rank: int
    status: int
    error: ErrorEvent | None = None
    log_tail: str = ""

    @property
    def signal(self) -> int | None:
        return -self.status if self.status < 0 else None

    @property
    def exit_code(self) -> int:
        """As a shell tells it: 128 + n is signal n."""
        return 128 - self.status if self.status < 0 else self.status


# What a log says, strongest first. Only asked where the rank left no error event.
_LOG_SAYS = (
    ("OutOfMemory", re.compile(r"OutOfMemoryError|CUDA out of memory|DefaultCPUAllocator: .*memory|^MemoryError",
                               re.M)),
    ("DiskFull", re.compile(r"No space left on device|Disk quota exceeded")),
    ("PeerLost", re.compile(r"Connection (closed|reset) by peer|Broken pipe|NCCL.*(remote process exited|timeout)"
                            r"|ProcessGroup\w+.*(timed out|aborted)|Watchdog caught collective", re.I)),
)  # fmt: skip
_BY_EXIT_CODE = {reason.exit_code: reason.name for reason in REASONS.values() if 69 < reason.exit_code < 128}
_MEANT = {
    signal.SIGSEGV: "it crashed (segmentation fault)",
    signal.SIGBUS: "it crashed (bus error; shared memory may be too small: raise resources.sharedMemory)",
    signal.SIGABRT: "it aborted",
    signal.SIGILL: "it used an instruction that this CPU doesn't have",
    signal.SIGFPE: "it crashed (arithmetic)",
}


def root_cause(ends: tuple[RankEnd, ...], oom_kills: int) -> Failed:
    """The failure to report. `ends` in the order of death, at least one; `oom_kills` counts this attempt's.

    A kill for memory, then what a rank itself reported, then other deaths, then broken connections.
    """
    judged = [(_judge(end, oom_kills), end) for end in ends]
    _, _, failed = min(
        ((_rank_of(failed), _when(end, index), failed) for index, (failed, end) in enumerate(judged)),
        key=lambda item: item[:2],
    )
    return failed


def _judge(end: RankEnd, oom_kills: int) -> Failed:
    if end.signal == signal.SIGKILL:
        if oom_kills > 0:
            what = "was killed because the pod reached its memory limit; raise resources.memory"
            return _failed("OutOfMemory", what, end)
        return _failed("RankKilled", "was killed by SIGKILL, which nobody here sent", end)
    if end.error is not None:
        return _failed(end.error.reason if end.error.reason in REASONS else "TrainingError", None, end)
    says = next((name for name, pattern in _LOG_SAYS if pattern.search(end.log_tail)), None)
    if end.signal is not None:
        name = signal.Signals(end.signal).name
        if says is not None:
            return _failed(says, f"ended by {name}; its log tells why", end)
        if end.signal in _MEANT:
            return _failed("TrainingError", f"ended by {name}: {_MEANT[signal.Signals(end.signal)]}", end)
        return _failed("RankKilled", f"was ended by {name}, which nobody here sent", end)
    reason = says or _BY_EXIT_CODE.get(end.status) or "TrainingError"
    return _failed(reason, f"ended with exit code {end.exit_code}", end)


def _failed(reason: str, what: str | None, end: RankEnd) -> Failed:
    said = f"rank {end.rank} {what}" if what else f"rank {end.rank}: {end.error.message if end.error else ''}"
    tail = end.log_tail or (end.error.traceback if end.error else "")
    return Failed(reason, said, rank=end.rank, exit_code=end.exit_code, log_tail=tail)


def _rank_of(failed: Failed) -> int:
    if failed.reason == "OutOfMemory":
        return 0
    if failed.reason == "RankKilled":
        return 1
    return 3 if failed.reason == "PeerLost" else 2


def _when(end: RankEnd, index: int) -> tuple[int, float]:
    """Errors are ordered by their own clock, then the silent deaths in the order in which they were seen."""
    return (0, end.error.time) if end.error else (1, float(index))
