"""Prepares a process for importing torch and its companions. The module imports none of them."""

from __future__ import annotations

import logging
import os
import sys


def quiet() -> None:
    """Turns off network access, advice and progress bars: people read the log to find an error."""
    without_trackers()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def without_trackers() -> None:
    """Makes the libraries of trackers count as not installed for the life of this process.

    Accelerate imports MLflow and W&B if they are installed, which takes seconds and starts threads.
    A rank has no use for them, as the supervisor's tracker process records what ranks report.
    """
    for name in ("mlflow", "wandb", "tensorboard", "tensorboardX"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
