"""Records how long steps took, so that the next run can estimate its duration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

MEASURED_CORES = 2  # default durations were measured on a machine with two idle cores


def load(path: Path) -> dict[str, float]:
    """Returns the seconds of each step in the last run that did it; empty if there is no file."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {key: float(value) for key, value in document.items() if isinstance(value, int | float)}


def save(path: Path, seconds: Mapping[str, float]) -> None:
    """Merges `seconds` (by step) into the file, which is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    merged = {**load(path), **{key: round(value, 1) for key, value in seconds.items()}}
    partial.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def expected(default: float, parallel: float, cores: int) -> float:
    """Estimates the seconds of a step that this machine has never run.

    `default` seconds were measured on MEASURED_CORES cores, and the share `parallel` (0 to 1) of
    that time shrinks in proportion to the cores (Amdahl's law).
    """
    return default * (1 - parallel + parallel * MEASURED_CORES / max(1, cores))


def clock(seconds: float) -> str:
    """Formats a duration: 7 s, 1:05, 1:02:03."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    minutes, rest = divmod(rounded, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
