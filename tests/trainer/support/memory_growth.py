"""Measures a rank's anonymous memory while it loads its model and while it writes the result: a
preparation of a rank's process.

Anonymous memory is what the kernel can't take back, unlike the pages of mapped files.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)
_INTERVAL_SECONDS = 0.003


@dataclass(frozen=True)
class MemoryGrowth:
    """Writes by how many bytes each phase's peak exceeds its beginning to a file in `folder` that
    is named after the rank. The phases are load, shard (with fsdp) and write."""

    folder: Path

    def install(self) -> None:
        from finetune_trainer.model import loading
        from finetune_trainer.model.result import export
        from finetune_trainer.parallel import fsdp

        for owner, name, phase in (
            (loading, "load", "load"),
            (fsdp, "shard_model", "shard"),
            (export, "write", "write"),
            (export, "send", "write"),
        ):
            if hasattr(owner, name):
                setattr(owner, name, self._measured(getattr(owner, name), phase))

    def read(self, rank: int) -> dict[str, int]:
        """Returns the growth by phase of a rank that has ended."""
        return {path.suffix[1:]: json.loads(path.read_text()) for path in self.folder.glob(f"memory-{rank}.*")}

    def _measured(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            first, samples, ended = _anonymous(), [], threading.Event()

            def watch() -> None:
                while not ended.is_set():
                    samples.append(_anonymous())
                    time.sleep(_INTERVAL_SECONDS)

            thread = threading.Thread(target=watch, daemon=True)
            thread.start()
            try:
                return function(*arguments, **options)
            finally:
                ended.set()
                thread.join()
                growth = max([*samples, _anonymous()]) - first
                (self.folder / f"memory-{os.environ['RANK']}.{phase}").write_text(json.dumps(growth))

        return call


def _anonymous() -> int:
    match = _ANONYMOUS.search(Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) * 1024
