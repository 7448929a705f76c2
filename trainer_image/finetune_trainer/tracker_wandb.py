"""Weights & Biases as a Tracker, where its package is installed. Offline, its files become part of the result."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Literal

from finetune_api.run import WandbConfig
from finetune_trainer.scalars import Point
from finetune_trainer.tracker import Ending, Subject


class Wandb:
    name = "wandb"
    ends_when: Literal["trained", "published"] = "trained"  # so that offline files can be uploaded with the result

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
            raise RuntimeError("wandb isn't installed in this image; build one with finetune-operator[wandb]") from None
        self._wandb: Any = wandb
        self._config = config
        self._subject = subject
        self._run: Any = None

    def open(self) -> tuple[str, int]:
        run = self._subject.run
        self._subject.folder.mkdir(parents=True, exist_ok=True)
        # Its id is the job's, so that another attempt goes on in the same run.
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
        held = int(self._run.summary.get("step", -1)) if online and self._run.resumed else -1
        return str(self._run.url or f"offline, in {self._subject.folder}"), held

    def send(self, points: Sequence[Point]) -> None:
        for at in points:
            self._run.log({**at.values, "step": at.step, "time": at.time})

    def close(self, ending: Ending) -> str:
        if ending.how == "trained":
            self._run.summary["output"] = self._subject.run.output.display
            for name, value in ending.metrics.items():
                self._run.summary[name] = value
        self._run.finish(exit_code=1 if ending.how == "failed" else 0)
        return "finished"
