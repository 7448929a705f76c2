"""Keeps trackers' libraries out of the ranks: Accelerate imports MLflow and W&B wherever they are installed, which
takes seconds and starts threads. Called by `rank` before anything heavy is imported.
"""

from __future__ import annotations

import sys

_TRACKERS = ("mlflow", "wandb", "tensorboard", "tensorboardX")


def without_trackers() -> None:
    """For the life of this process they count as not installed."""
    for name in _TRACKERS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
