"""Does one run of the trainer with the code on PYTHONPATH and prints its tokens per second.

The code may be that of an earlier revision. The request is the first argument, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_UNCOMPILED = {"compile": "never", "activation_checkpointing": "never"}
"""Compiling takes longer than a measurement."""


def main(request: dict[str, Any]) -> float:
    """Returns the tokens per second of the steps after the first."""
    from benchmarks.trainer import ours

    fields = {name: request[name] for name in ("global_batch", "longest", "seconds", "ranks")}
    kind: Any = getattr(ours, "RunRequest", None) or vars(ours)["Asked"]  # its name in earlier revisions
    if request["full"]:
        _train_in_full(ours)
    threads = 2 // request["ranks"]
    paths = {name: Path(request[name]) for name in ("model", "rows")}
    record = ours.run(kind(**paths, **fields, timeout=120, threads=threads, training=_UNCOMPILED))
    speed = ours.speed(record)
    return speed.tokens / speed.seconds


def _train_in_full(ours: Any) -> None:
    original = ours._config

    def in_full(*arguments: Any) -> Any:
        return original(*arguments).model_copy(update={"method": "full", "lora": None})

    ours._config = in_full


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # it has modules of today's benchmark
    print(main(json.loads(sys.argv[1])))
