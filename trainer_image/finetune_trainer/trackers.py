"""The process that speaks to trackers: `python -m finetune_trainer.trackers`, started by `tracking`.

A process of its own, so that a client library that hangs, leaks or crashes does so alone. It gets its keys from mounted
files, tails the events files, says what happens through its own events file, and ends when all trackers have.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from finetune_api import events, run
from finetune_api.names import SECRET_TRACKER_KEYS
from finetune_trainer import fetch
from finetune_trainer.paths import Paths
from finetune_trainer.tracker import Ending, State, Subject, Tracker, Worker


def main() -> int:
    paths = Paths(Path(os.environ["FINETUNE_SCRATCH"]))
    config = run.parse(paths.run_config.read_bytes())
    secrets = _take_keys(config.tracking)
    subject = Subject(config, paths.tracking, os.environ)
    earlier = paths.resume / fetch.HISTORY
    out = (paths.events / "tracking.jsonl").open("ab", buffering=0)

    def tell(tracker: str, state: State, message: str) -> None:
        event = events.TrackingEvent(time=time.time(), tracker=tracker, state=state, message=message)
        out.write(f"{events.encode(event)}\n".encode())

    def hide(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        return text

    def ending() -> Ending | None:
        try:
            return Ending.model_validate_json(paths.tracking_ending.read_bytes())
        except (OSError, ValidationError):
            return None

    workers = [
        Worker(
            make,
            name,
            scratch_events=paths.rank_events(0),
            earlier=earlier.read_text() if earlier.is_file() else "",
            ending=ending,
            tell=tell,
            hide=hide,
        )
        for name, make in _makers(config.tracking, subject).items()
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 0


def _makers(config: run.TrackingConfig, subject: Subject) -> dict[str, Callable[[], Tracker]]:
    makers: dict[str, Callable[[], Tracker]] = {}
    if config.mlflow is not None:
        mlflow = config.mlflow

        def make_mlflow() -> Tracker:
            from finetune_trainer.tracker_mlflow import Mlflow

            return Mlflow(mlflow, subject)

        makers["mlflow"] = make_mlflow
    if config.wandb is not None:
        wandb = config.wandb

        def make_wandb() -> Tracker:
            from finetune_trainer.tracker_wandb import Wandb

            return Wandb(wandb, subject)

        makers["wandb"] = make_wandb
    return makers


def _take_keys(config: run.TrackingConfig) -> tuple[str, ...]:
    """From the mounted Secrets into this process's environment; returns what must never be shown."""
    for tracker in (config.mlflow, config.wandb):
        if tracker is None or tracker.credentials is None:
            continue
        for key in SECRET_TRACKER_KEYS:
            file = Path(tracker.credentials) / key
            if file.is_file():
                os.environ[key] = file.read_text().strip()
    keys = [key for key in SECRET_TRACKER_KEYS if not key.endswith(("USERNAME", "URL"))]
    return tuple(value for key in keys if (value := os.environ.get(key)))


if __name__ == "__main__":
    sys.exit(main())
