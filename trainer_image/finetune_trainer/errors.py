"""Defines RunError, the one exception that ends an attempt on purpose.

Its reason is a name in finetune_api.reasons. The module also maps exceptions of other libraries,
and the text of a log, to such a reason.
"""

from __future__ import annotations

import errno
import re
from typing import Any

from finetune_api.reasons import REASONS
from finetune_api.untrusted import without_url_secrets


class RunError(Exception):
    """Reports that the attempt can't continue.

    `reason` is a name in REASONS; `message` names the field, the value and the remedy. `rank`,
    `exit_code` and `log_tail` describe the process that failed, if one did.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        rank: int | None = None,
        exit_code: int | None = None,
        log_tail: str = "",
    ) -> None:
        message = without_url_secrets(message)  # a library may quote any URL, and status is read by many
        super().__init__(f"{reason}: {message}")
        if reason not in REASONS:
            raise ValueError(f"{reason!r} isn't a name in finetune_api.reasons.REASONS")
        self.reason = reason
        self.message = message
        self.rank = rank
        self.exit_code = exit_code
        self.log_tail = log_tail


def insufficient_memory(message: str, **process: Any) -> RunError:
    """Returns the error for a lack of memory (`message`) that smaller micro-batches can't cure.

    `process` describes the process that failed, as in RunError.
    """
    return RunError(
        "InsufficientMemory",
        f"{message}; the largest micro-batch is a single example, so a restart can't use less memory: raise "
        "resources.memory or use GPUs with more memory, lower dataset.maxSequenceLength, set distribution.strategy to "
        "zero3 or fsdp, or let several processes share each row (distribution.sequenceParallelSize)",
        **process,
    )


# Which reason the text of an exception or of a log stands for, the strongest first. A lost peer
# comes last, because the peers of a rank that ran out of memory lose their connections too.
_PATTERNS = (
    (
        "OutOfMemory",
        re.compile(
            r"out of memory|OutOfMemoryError|can't allocate memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED"
            r"|^MemoryError",
            re.I | re.M,
        ),
    ),
    (
        "GpuFault",
        re.compile(
            r"uncorrectable (ECC|NVLink) error|fallen off the bus|GPU is lost|hardware stack error"
            r"|over nvlink or a hardware error|NVRM: Xid",
            re.I,
        ),
    ),
    (
        "GpuUnavailable",
        re.compile(
            r"CUDA driver version is insufficient|NVIDIA driver on your system|no CUDA-capable device is detected"
            r"|No CUDA GPUs are available|CUDA-capable device\(s\) is/are busy|CUDA error: system not yet initialized"
            r"|libcuda\.so\S*: cannot open",
            re.I,
        ),
    ),
    ("DiskFull", re.compile(r"No space left on device|Disk quota exceeded", re.I)),
    (
        "PeerLost",
        re.compile(
            r"connection (closed|reset|refused)|broken pipe|socket (closed|timeout)"
            r"|gloo.*(timed out|timeout|connect)|ProcessGroup\w+.*(timed out|aborted)|Watchdog caught collective"
            r"|NCCL (error|communicator)|NCCL.*timeout|remote process exited|ncclRemoteError|store.*timeout"
            r"|timed out waiting|client socket has (failed|timed out)|heartbeat",
            re.I,
        ),
    ),
)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


# Errors of these types are raised by what a program was given, wherever it runs. Their texts may
# quote a setting, so they aren't searched for reasons.
_DETERMINISTIC = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError,
    RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def is_deterministic(error: BaseException) -> bool:
    """Whether an exception is of a type that another attempt with the same input raises again."""
    return isinstance(error, _DETERMINISTIC)


def reason_in(text: str) -> str | None:
    """Returns the strongest reason that the text of an exception or a log stands for, or None."""
    return next((reason for reason, pattern in _PATTERNS if pattern.search(text)), None)


def run_error_from(error: BaseException) -> RunError:
    """Returns the error itself if it is a RunError, otherwise a RunError for it.

    The reason is chosen by the exception's type and then, unless the type already says that the
    input is to blame, by its text; it is TrainingError if neither is recognized.
    """
    if isinstance(error, RunError):
        return error
    text = f"{type(error).__name__}: {error}"
    short = text if len(text) <= 600 else f"{text[:400]} … {text[-200:]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return RunError("OutOfMemory", short)
    if is_disk_full(error):
        return RunError("DiskFull", f"{short}; raise resources.scratch")
    reason = None if is_deterministic(error) else reason_in(text)
    if reason is None and type(error).__name__ in ("DistNetworkError", "DistBackendError", "DistStoreError"):
        reason = "PeerLost"
    if reason == "DiskFull":
        return RunError(reason, f"{short}; raise resources.scratch")
    return RunError(reason or "TrainingError", short)
