"""Defines RunError, the one exception that ends an attempt on purpose.

Its reason is a name in finetune_api.reasons. The module also maps exceptions of other libraries,
and the text of a log, to such a reason.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sign:
    """Says which reason the text of an exception or of a log stands for, and what to do about it.

    `remedy` is empty if the meaning of the reason already has it.
    """

    reason: str
    pattern: re.Pattern[str]
    remedy: str = ""


def _sign(reason: str, pattern: str, remedy: str = "") -> Sign:
    return Sign(reason, re.compile(pattern, re.I | re.M), remedy)


# The strongest first. What says which limit of a pod is too small comes before the memory or the
# disk that seems to be full, and a lost peer comes last, because the peers of a rank that failed
# lose their connections too. A program's own error is before it, since NCCL reports that as well.
_CUDA = r"(CUDA (driver )?error:|Cuda failure( \d+)?|Triton Error \[CUDA\]:) *'?"
SIGNS = (
    _sign(
        "InvalidConfig",
        r"(\bdev/shm|shared memory|</?torch_).*(No space left|cannot allocate)|No space left on device.*\bdev/shm",
        "resources.sharedMemory: the pod's shared memory is full; raise it",
    ),
    _sign(
        "InvalidConfig",
        r"ibv_\w+ failed.*cannot allocate memory",
        "pod.network: a network device can't lock memory; use a profile whose containers have the capability IPC_LOCK, "
        "or have the limit of locked memory (memlock) raised in the nodes' container runtime",
    ),
    _sign(
        "OutOfMemory",
        r"out of memory|OutOfMemoryError|can(no|')t allocate memory|DefaultCPUAllocator|std::bad_alloc"
        r"|unable to allocate [\d.]+ \w?i?B|memory allocation of \d+ bytes failed|^MemoryError"
        # A handle that can't be created is a lack of memory, in all of these libraries.
        r"|CU[A-Z]+_STATUS_\w*ALLOC(ATION)?_FAILED|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_NOT_INITIALIZED",
    ),
    _sign(
        "GpuFault",
        r"uncorrectable (ECC|NVLink) error|fallen off the bus|GPU is lost|hardware stack error"
        r"|over nvlink or a hardware error|NVRM: Xid",
    ),
    _sign(
        "GpuUnavailable",
        rf"no kernel image is available|{_CUDA}device kernel image is invalid",
        "this image's PyTorch doesn't support the generation of the GPU; select other nodes with pod.nodeSelector, or "
        "build a trainer image for another CUDA",
    ),
    _sign(
        "GpuUnavailable",
        r"system not yet initialized",
        "GPUs that are connected by NVSwitch need NVIDIA's Fabric Manager, which must run on the node; GPUs for "
        "confidential computing must be set to ready",
    ),
    _sign(
        "GpuUnavailable",
        r"unsupported display driver|Driver/library version mismatch",
        "the driver's libraries and its kernel module have different versions: restart the node after an update",
    ),
    _sign(
        "GpuUnavailable",
        r"forward compatibility was attempted",
        "libraries of CUDA's package for forward compatibility (cuda-compat) don't support this GPU: leave them out of "
        "the image, and update the driver",
    ),
    _sign(
        "GpuUnavailable",
        r"CUDA-capable devices?(\(s\))? (is/)?are busy|Duplicate GPU detected",
        "each process needs a GPU of its own: look for other processes on it, for its compute mode, and for a device "
        "plugin that shares GPUs",
    ),
    _sign(
        "GpuUnavailable",
        r"CUDA driver version is insufficient|NVIDIA driver on your system|no CUDA-capable device is detected"
        r"|No CUDA GPUs are available|CUDA unknown error|unsupported toolchain|libcuda\.so\S*: cannot open"
        rf"|{_CUDA}(unknown error|initialization error|invalid device ordinal)",
    ),
    _sign("DiskFull", r"No space left on device|Disk quota exceeded", "raise resources.scratch"),
    _sign(
        "TrainingError",
        rf"{_CUDA}(an illegal (memory access|instruction)|device-side assert|unspecified launch failure"
        r"|misaligned address|invalid (program counter|device function|configuration argument)|the launch timed out"
        r"|too many resources requested|operation not supported on global)",
    ),
    _sign(
        "PeerLost",
        r"connection (closed|reset|refused)|broken pipe|socket (closed|timeout)"
        r"|gloo.*(timed out|timeout|connect)|ProcessGroup\w+.*(timed out|aborted)|Watchdog caught collective"
        r"|NCCL (error|communicator)|NCCL.*timeout|remote process exited|ncclRemoteError|store.*timeout"
        r"|timed out waiting|client socket has (failed|timed out)|heartbeat",
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


def sign_in(text: str) -> Sign | None:
    """Returns the strongest sign in the text of an exception or a log, or None."""
    return next((sign for sign in SIGNS if sign.pattern.search(text)), None)


def reason_in(text: str) -> str | None:
    """Returns the strongest reason that the text of an exception or a log stands for, or None."""
    sign = sign_in(text)
    return sign.reason if sign else None


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
    sign = None if is_deterministic(error) else sign_in(text)
    if sign is None and is_disk_full(error):
        return RunError("DiskFull", f"{short}; raise resources.scratch")
    if sign is not None:
        return RunError(sign.reason, with_remedy(short, sign))
    connection = type(error).__name__ in ("DistNetworkError", "DistBackendError", "DistStoreError")
    return RunError("PeerLost" if connection else "TrainingError", short)


def with_remedy(message: str, sign: Sign) -> str:
    """Returns the message with what a sign says should be done, if anything."""
    return f"{message}; {sign.remedy}" if sign.remedy else message
