"""Runs the tracker process: `python -m finetune_trainer.reporting.trackers`.

Trackers have a process of their own, so that a client library that hangs, leaks or crashes harms
nothing else. The process reads its keys from mounted files, tails rank 0's events file, reports
through its own events file, and exits when all trackers are done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from finetune_api.messages import events, run
from finetune_api.names import CHECKPOINT_HISTORY, SECRET_TRACKER_KEYS
from finetune_trainer import limits
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.trackers import servers
from finetune_trainer.reporting.trackers.worker import Ending, State, Subject, Tracker, Worker, WorkerContext

_MEMORY_BYTES = 2 << 30  # the clients' libraries take less than half of it


def main() -> int:
    """Runs one worker per tracker to its end. Returns the exit code."""
    paths = Paths(Path(os.environ["FINETUNE_SCRATCH"]))
    config = run.parse(paths.run_config.read_bytes())
    secrets = _load_keys(config.tracking)
    subject = Subject(config, paths.tracking)
    history = paths.resume / CHECKPOINT_HISTORY
    events_file = (paths.events / "tracking.jsonl").open("ab", buffering=0)

    def report(tracker: str, state: State, message: str) -> None:
        """Writes an event for the supervisor."""
        event = events.TrackingEvent(time=time.time(), tracker=tracker, state=state, message=message)
        events_file.write(f"{events.encode(event)}\n".encode())

    def redact(text: str) -> str:
        """Replaces secrets by asterisks."""
        for secret in secrets:
            text = text.replace(secret, "***")
        return text

    def ending() -> Ending | None:
        """Returns how the attempt ended; None while it runs."""
        try:
            return Ending.model_validate_json(paths.tracking_ending.read_bytes())
        except (OSError, ValidationError):
            return None

    context = WorkerContext(
        events=paths.rank_events(0),
        history=history.read_text() if history.is_file() else "",
        ending=ending,
        report=report,
        redact=redact,
    )
    # From here on, as what a server answers may have any size.
    limits.limit_memory(_MEMORY_BYTES)
    workers = [Worker(make, name, context) for name, make in _makers(config.tracking, subject).items()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 0


def _makers(config: run.TrackingConfig, subject: Subject) -> dict[str, Callable[[], Tracker]]:
    """Returns, by name, functions that import a tracker's client library and create the tracker."""
    makers: dict[str, Callable[[], Tracker]] = {}
    if config.mlflow is not None:
        mlflow = config.mlflow

        def make_mlflow() -> Tracker:
            """Creates the tracker of MLflow."""
            from finetune_trainer.reporting.trackers.mlflow_tracker import Mlflow

            servers.check_mlflow(config, os.environ)
            return Mlflow(mlflow, subject)

        makers["mlflow"] = make_mlflow
    if config.wandb is not None:
        wandb = config.wandb

        def make_wandb() -> Tracker:
            """Creates the tracker of Weights & Biases."""
            from finetune_trainer.reporting.trackers.wandb_tracker import Wandb

            servers.check_wandb(config, os.environ)
            return Wandb(wandb, subject)

        makers["wandb"] = make_wandb
    return makers


def _load_keys(config: run.TrackingConfig) -> tuple[str, ...]:
    """Copies keys from the mounted Secrets into this process's environment.

    Returns the values that must never appear in a message.
    """
    for tracker in (config.mlflow, config.wandb):
        if tracker is None or tracker.credentials is None:
            continue
        for key in SECRET_TRACKER_KEYS:
            file = Path(tracker.credentials) / key
            if file.is_file():
                os.environ[key] = file.read_text().strip()
    keys = [key for key in SECRET_TRACKER_KEYS if not key.endswith(("USERNAME", "URL", "URI"))]
    return tuple(value for key in keys if (value := os.environ.get(key)))


if __name__ == "__main__":
    sys.exit(main())
