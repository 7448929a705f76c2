"""Implements Tracker for Weights & Biases, if its package is installed.

In offline mode its files become part of the result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Literal

from finetune_api.messages.run import WandbConfig
from finetune_trainer.reporting.trackers.scalars import Point
from finetune_trainer.reporting.trackers.worker import Ending, Subject


class Wandb:
    """Records one run per job; all attempts continue the same run."""

    name = "wandb"
    # Offline files are complete after this, and are then uploaded with the result.
    ends_when: Literal["trained", "published"] = "trained"

    def __init__(self, config: WandbConfig, subject: Subject) -> None:
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_DISABLE_CODE"] = "true"
        os.environ["WANDB_DISABLE_GIT"] = "true"
        os.environ["WANDB_CONSOLE"] = "off"
        os.environ["WANDB_X_DISABLE_STATS"] = "true"
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            import wandb
        except ImportError:
            raise RuntimeError("wandb isn't installed in this image; install finetune-operator[wandb] in it") from None
        self._wandb: Any = wandb
        self._config = config
        self._subject = subject
        self._run: Any = None

    def open(self) -> tuple[str, int]:
        """Starts or resumes the run. Returns its URL and the last step that it already contains."""
        run = self._subject.run
        self._subject.folder.mkdir(parents=True, exist_ok=True)
        # The id depends on the job only, so that the next attempt resumes the same run.
        identity = hashlib.sha256(run.job.uid.encode()).hexdigest()[:16]
        online = self._config.mode == "online"
        self._run = self._wandb.init(
            project=self._config.project,
            entity=self._config.entity or None,
            name=run.job.name,
            id=identity,
            resume="allow" if online else None,
            mode=self._config.mode,
            dir=str(self._subject.folder),
            config=run.model_dump(
                mode="json", by_alias=True, exclude_none=True, include={"method", "lora", "training", "world"}
            ),
            settings=self._wandb.Settings(init_timeout=20),
        )
        last_step = int(self._run.summary.get("step", -1)) if online and self._run.resumed else -1
        return str(self._run.url or f"offline, in {self._subject.folder}"), last_step

    def send(self, points: Sequence[Point]) -> None:
        """Logs points."""
        for point in points:
            self._run.log({**point.values, "step": point.step, "time": point.time})

    def close(self, ending: Ending) -> str:
        """Writes the summary and finishes the run."""
        if ending.how == "trained":
            self._run.summary["output"] = self._subject.run.output.display
            for name, value in ending.metrics.items():
                self._run.summary[name] = value
        self._run.finish(exit_code=1 if ending.how == "failed" else 0)
        return "finished"
