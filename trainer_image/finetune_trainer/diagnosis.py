"""An exception that ended a rank → a reason of finetune_api.reasons. Pure; called once, by `rank`."""

from __future__ import annotations

import errno
import re

from finetune_trainer.failure import Failed

_MEMORY = re.compile(r"out of memory|can't allocate memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED", re.I)
_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (closed|timeout)|gloo.*(timed out|timeout|connect)"
    r"|NCCL (error|communicator)|remote process exited|ncclRemoteError|store.*timeout|timed out waiting"
    r"|client socket has (failed|timed out)|heartbeat",
    re.I,
)


def failed_from(error: BaseException) -> Failed:
    """What foresaw itself keeps its reason; the others are told by type, then by their words."""
    if isinstance(error, Failed):
        return error
    text = f"{type(error).__name__}: {error}"
    short = text if len(text) <= 600 else f"{text[:400]} … {text[-200:]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _MEMORY.search(text):
        return Failed("OutOfMemory", short)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed("DiskFull", f"{short}; raise resources.scratch")
    if "No space left on device" in text:
        return Failed("DiskFull", f"{short}; raise resources.scratch")
    if type(error).__name__ in ("DistNetworkError", "DistBackendError", "DistStoreError") or _PEER.search(text):
        return Failed("PeerLost", short)
    return Failed("TrainingError", short)
