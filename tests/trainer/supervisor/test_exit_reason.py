"""A table from the ways in which ranks end to the reason that is reported."""

from __future__ import annotations

import signal

import pytest

from finetune_api.messages.events import ErrorEvent
from finetune_trainer.errors import RunError
from finetune_trainer.supervisor.exit_reason import RankEnd, root_cause, with_gpu_faults


def error(rank: int, reason: str, time: float = 1.0) -> ErrorEvent:
    return ErrorEvent(time=time, rank=rank, reason=reason, message=f"{reason} it was")


LOST = RankEnd(0, 75, error(0, "PeerLost", 5.0))
KILLED = RankEnd(1, -signal.SIGKILL)

TABLE: dict[str, tuple[tuple[RankEnd, ...], int, str, int]] = {
    "killed for memory": ((KILLED,), 1, "OutOfMemory", 1),
    "killed by somebody": ((KILLED,), 0, "RankKilled", 1),
    "a kill explains broken connections": ((LOST, KILLED), 0, "RankKilled", 1),
    "a single example without memory explains the rest": (
        (RankEnd(0, 70, error(0, "OutOfMemory", 1.0)), RankEnd(1, 81, error(1, "InsufficientMemory", 2.0))), 0,
        "InsufficientMemory", 1,
    ),
    "memory explains broken connections": ((LOST, KILLED), 2, "OutOfMemory", 1),
    "only broken connections": ((LOST,), 0, "PeerLost", 0),
    "an error explains broken connections": ((LOST, RankEnd(2, 71, error(2, "NonFiniteLoss", 9.0))), 0,
                                             "NonFiniteLoss", 2),
    "of two errors the earlier": ((RankEnd(0, 1, error(0, "TrainingError", 3.0)),
                                   RankEnd(1, 65, error(1, "DatasetInvalid", 2.0))), 0, "DatasetInvalid", 1),
    "an error before a silent death": ((RankEnd(3, 1), RankEnd(0, 1, error(0, "TrainingError"))), 0,
                                       "TrainingError", 0),
    "a GPU's memory by the log": ((RankEnd(0, 1, None, "torch.OutOfMemoryError: CUDA out of memory."),), 0,
                                  "OutOfMemory", 0),
    "the disk by the log": ((RankEnd(0, 1, None, "OSError: [Errno 28] No space left on device"),), 0, "DiskFull", 0),
    "a watchdog's abort": ((RankEnd(0, -signal.SIGABRT, None, "[Rank 0] Watchdog caught collective operation "
                                    "timeout"),), 0, "PeerLost", 0),
    "an abort": ((RankEnd(0, -signal.SIGABRT),), 0, "TrainingError", 0),
    "a GPU's fault by the log": ((RankEnd(0, -signal.SIGABRT, None, "CUDA error: uncorrectable ECC error"),),
                                 0, "GpuFault", 0),
    "a GPU's fault explains errors of others": (
        (RankEnd(0, 1, error(0, "TrainingError", 1.0)), RankEnd(1, 80, error(1, "GpuFault", 2.0))), 0, "GpuFault", 1),
    "a driver by the log": ((RankEnd(0, 1, None, "RuntimeError: The NVIDIA driver on your system is too old"),), 0,
                            "GpuUnavailable", 0),
    "an exit code of a GPU": ((RankEnd(0, 79),), 0, "GpuUnavailable", 0),
    "a launch failure alone is the program's": ((RankEnd(0, 1, None, "CUDA error: unspecified launch failure"),), 0,
                                                "TrainingError", 0),
    "a crash": ((RankEnd(0, -signal.SIGSEGV),), 0, "TrainingError", 0),
    "a foreign SIGTERM": ((RankEnd(0, -signal.SIGTERM),), 0, "RankKilled", 0),
    "an exit code with a reason": ((RankEnd(0, 71),), 0, "NonFiniteLoss", 0),
    "an exit code without a reason": ((RankEnd(0, 1),), 0, "TrainingError", 0),
    "a reason of another version": ((RankEnd(0, 1, error(0, "Novel")),), 0, "TrainingError", 0),
}  # fmt: skip


@pytest.mark.parametrize(("ends", "oom_kills", "reason", "rank"), TABLE.values(), ids=TABLE)
def test_the_root_cause_is_reported(ends: tuple[RankEnd, ...], oom_kills: int, reason: str, rank: int) -> None:
    failed = root_cause(ends, oom_kills)
    assert (failed.reason, failed.rank) == (reason, rank)
    assert f"rank {rank}" in failed.message


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("TrainingError", "GpuFault"), ("PeerLost", "GpuFault"), ("Stalled", "GpuFault"), ("RankKilled", "GpuFault"),
        ("OutOfMemory", "OutOfMemory"), ("StorageUnavailable", "StorageUnavailable"), ("DiskFull", "DiskFull"),
    ],
)  # fmt: skip
def test_a_failed_gpu_explains_what_ranks_show_of_it_and_nothing_else(reason: str, expected: str) -> None:
    shown = RunError(reason, "rank 3: unhandled cuda error", rank=3, exit_code=1, log_tail="tail")
    judged = with_gpu_faults(shown, ("GPU 1 (GPU-9f) reported Xid 79",))
    assert judged.reason == expected
    assert (judged.rank, judged.exit_code, judged.log_tail) == (3, 1, "tail")
    assert "rank 3: unhandled cuda error" in judged.message
    assert judged.message.startswith("GPU 1 (GPU-9f) reported Xid 79") is (expected == "GpuFault")
    assert with_gpu_faults(shown, ()) is shown


def test_a_signal_is_reported_with_the_exit_code_of_a_shell() -> None:
    assert root_cause((KILLED,), 0).exit_code == 137
