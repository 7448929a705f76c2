"""Judges why the ranks of a node ended.

The module is pure: it judges by the dead ranks, what they reported, and how many processes the
kernel killed for memory. The reason must be the root cause: the peers of a dead rank die of broken
connections, which explains nothing.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from finetune_api.messages.events import ErrorEvent
from finetune_api.reasons import REASONS
from finetune_trainer.errors import RunError, insufficient_memory, sign_in, with_remedy


@dataclass(frozen=True)
class RankEnd:
    """Describes a rank that ended although the supervisor hadn't stopped it.

    `status` is the one that subprocess returns: a signal if it is below 0.
    """

    rank: int
    status: int
    error: ErrorEvent | None = None
    log_tail: str = ""

    @property
    def signal(self) -> int | None:
        """The signal that ended the rank, if one did."""
        return -self.status if self.status < 0 else None

    @property
    def exit_code(self) -> int:
        """The exit code as a shell gives it: 128 + n for signal n."""
        return 128 - self.status if self.status < 0 else self.status


_BY_EXIT_CODE = {reason.exit_code: reason.name for reason in REASONS.values() if 69 < reason.exit_code < 128}
_EXPLAINED_BY_A_GPU = ("TrainingError", "RankKilled", "Stalled", "PeerLost", "GpuFault", "GpuUnavailable")
_SIGNAL_MEANINGS = {
    signal.SIGSEGV: "it crashed (segmentation fault)",
    signal.SIGBUS: "it crashed (bus error; shared memory may be too small: raise resources.sharedMemory)",
    signal.SIGABRT: "it aborted",
    signal.SIGILL: "it used an instruction that this CPU doesn't have",
    signal.SIGFPE: "it crashed (arithmetic)",
}


def root_cause(ends: tuple[RankEnd, ...], oom_kills: int) -> RunError:
    """Returns the failure to report.

    `ends` has at least one rank, in the order of death; `oom_kills` counts the kills for memory
    during this attempt. A lack of memory comes first, then a kill or a failed GPU, then other
    failures, then broken connections; of several such failures, the earliest one is reported.
    """
    candidates = [(_judge(end, oom_kills), end) for end in ends]
    _, _, cause = min(
        ((_severity(error), _order(end, index), error) for index, (error, end) in enumerate(candidates)),
        key=lambda item: item[:2],
    )
    return cause


def with_gpu_faults(error: RunError, faults: tuple[str, ...]) -> RunError:
    """Returns a GpuFault if a GPU of this node has failed and that explains the error.

    A failed GPU shows itself as an error of CUDA, of NCCL, or as a rank that hangs.
    """
    if not faults or error.reason not in _EXPLAINED_BY_A_GPU:
        return error
    return RunError(
        "GpuFault",
        f"{'; '.join(faults)}. {error.reason}: {error.message}",
        rank=error.rank,
        exit_code=error.exit_code,
        log_tail=error.log_tail,
    )


def with_smallest_micro_batches(error: RunError) -> RunError:
    """Returns InsufficientMemory for a rank's lack of memory, because micro-batches can't get
    smaller; any other error stays as it is."""
    if error.reason != "OutOfMemory" or error.rank is None:
        return error
    process = {"rank": error.rank, "exit_code": error.exit_code, "log_tail": error.log_tail}
    return insufficient_memory(error.message, **process)


def _judge(end: RankEnd, oom_kills: int) -> RunError:
    if end.signal == signal.SIGKILL:
        if oom_kills > 0:
            predicate = "was killed because the pod reached its memory limit; raise resources.memory"
            return _run_error("OutOfMemory", predicate, end)
        return _run_error("RankKilled", "was killed by a SIGKILL that the supervisor didn't send", end)
    if end.error is not None:
        return _run_error(end.error.reason if end.error.reason in REASONS else "TrainingError", None, end)
    logged = sign_in(end.log_tail)
    if end.signal is not None:
        name = signal.Signals(end.signal).name
        if logged is not None:
            return _run_error(logged.reason, with_remedy(f"was ended by {name}; its log has the cause", logged), end)
        if end.signal in _SIGNAL_MEANINGS:
            meaning = _SIGNAL_MEANINGS[signal.Signals(end.signal)]
            return _run_error("TrainingError", f"was ended by {name}: {meaning}", end)
        return _run_error("RankKilled", f"was ended by a {name} that the supervisor didn't send", end)
    predicate = f"ended with exit code {end.exit_code}"
    if logged is not None:
        return _run_error(logged.reason, with_remedy(predicate, logged), end)
    return _run_error(_BY_EXIT_CODE.get(end.status) or "TrainingError", predicate, end)


def _run_error(reason: str, predicate: str | None, end: RankEnd) -> RunError:
    """Returns an error whose message is "rank N <predicate>" or, without a predicate, its
    report."""
    reported = end.error.message if end.error else ""
    message = f"rank {end.rank} {predicate}" if predicate else f"rank {end.rank}: {reported}"
    tail = end.log_tail or (end.error.traceback if end.error else "")
    return RunError(reason, message, rank=end.rank, exit_code=end.exit_code, log_tail=tail)


def _severity(error: RunError) -> int:
    """Returns a number that is lowest for the reason that explains all others."""
    if error.reason == "InsufficientMemory":
        return -1
    if error.reason == "OutOfMemory":
        return 0
    if error.reason in ("RankKilled", "GpuFault", "GpuUnavailable"):
        return 1
    return 3 if error.reason == "PeerLost" else 2


def _order(end: RankEnd, index: int) -> tuple[int, float]:
    """Orders reported errors by their own clock, then silent deaths as they were noticed."""
    return (0, end.error.time) if end.error else (1, float(index))
