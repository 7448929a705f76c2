"""Writes PyTorch's flight recorder to a file when the supervisor requests it.

The flight recorder holds the last collectives of a process (TORCH_FR_BUFFER_SIZE of them) of gloo
and of NCCL. A thread writes it, since a rank that hangs runs no other code. Its stacks are left
out: they are resolved from debug symbols, which takes minutes, and faulthandler prints the stacks
anyway.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.5
_FUNCTIONS = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}


def answer_requests(request: Path, target: Path) -> None:
    """Starts a thread that writes the recorder to `target` once the file `request` exists."""
    threading.Thread(target=_wait, args=(request, target), name="flight-recorder", daemon=True).start()


def _wait(request: Path, target: Path) -> None:
    while not request.exists():
        threading.Event().wait(_POLL_SECONDS)
    partial = target.with_suffix(".tmp")
    partial.write_text(json.dumps(dump()))
    partial.rename(target)


def dump() -> dict[str, Any]:
    """Returns the recorder's content by backend, in PyTorch's own JSON; empty for a version of
    PyTorch without it."""
    import torch._C._distributed_c10d as c10d

    functions = {backend: getattr(c10d, name, None) for backend, name in _FUNCTIONS.items()}
    return {backend: json.loads(function()) for backend, function in functions.items() if function is not None}
