"""Finds the newest complete checkpoint on a disk, for tests."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer import manifest
from finetune_trainer.paths import step_number


def newest_complete(checkpoints: Path) -> Path | None:
    """Returns the `step-N` folder with the highest N that verifies."""
    steps = {step: path for path in checkpoints.glob("step-*") if (step := step_number(path.name)) is not None}
    return next((steps[step] for step in sorted(steps, reverse=True) if manifest.verify(steps[step]) is None), None)
