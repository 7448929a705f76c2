"""Samples the anonymous memory of a rank, by phase of its run: a preparation of a rank's process.

Anonymous memory is what the kernel can't take back, unlike the pages of mapped files.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)
_INTERVAL_SECONDS = 0.003


@dataclass(frozen=True)
class MemoryByPhase:
    """Writes the first, the last and the highest value of each phase, in bytes, to a file in
    `folder` that is named after the rank."""

    folder: Path

    def install(self) -> None:
        from finetune_trainer.reporting.event_writer import EventWriter

        samples: dict[str, dict[str, int]] = {}
        current = ["starting"]
        original = EventWriter.phase

        def phase(writer: Any, name: str, *arguments: Any) -> None:
            _sample(samples, current[0])
            current[0] = name
            _sample(samples, name)
            if name == "done":
                (self.folder / f"memory-{os.environ['RANK']}.json").write_text(json.dumps(samples))
            original(writer, name, *arguments)

        def watch() -> None:
            while True:
                _sample(samples, current[0])
                time.sleep(_INTERVAL_SECONDS)

        EventWriter.phase = phase  # type: ignore[method-assign, assignment]
        threading.Thread(target=watch, daemon=True).start()

    def read(self, rank: int) -> dict[str, dict[str, int]]:
        """Returns {phase: {"first", "peak", "last"}} of a rank that has ended."""
        samples: dict[str, dict[str, int]] = json.loads((self.folder / f"memory-{rank}.json").read_text())
        return samples


def _sample(samples: dict[str, dict[str, int]], phase: str) -> None:
    match = _ANONYMOUS.search(Path("/proc/self/status").read_text())
    assert match is not None
    size = int(match.group(1)) * 1024
    entry = samples.setdefault(phase, {"first": size, "peak": size, "last": size})
    entry["peak"], entry["last"] = max(entry["peak"], size), size
