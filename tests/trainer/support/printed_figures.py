"""Runs a module of this package in a process of its own and returns the figures that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[3]
_SOURCES = os.pathsep.join(str(_ROOT / folder) for folder in ("operator", "trainer_image", "tests"))


def printed_figures(module: str, **environment: str) -> dict[str, float]:
    """Return the JSON that a module prints in its last line. Triton decides at its import whether
    it interprets, hence the process."""
    done = subprocess.run(
        [sys.executable, "-m", f"trainer.support.{module}"],
        env={**os.environ, "PYTHONPATH": _SOURCES, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures
