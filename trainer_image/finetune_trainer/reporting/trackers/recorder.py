"""Runs all trackers of an attempt. Nothing here raises, and only `add_files` and `end` wait.

TensorBoard's file is made from the history; the tracker process feeds the other trackers.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune_api import names
from finetune_api.messages.evaluation import Evaluation
from finetune_api.messages.events import ScoresEvent
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.reporting.history import History
from finetune_trainer.reporting.trackers import tensorboard
from finetune_trainer.reporting.trackers.process import Attempt, TrackerProcess
from finetune_trainer.reporting.trackers.worker import Ending
from finetune_trainer.storage.base import Storage


class Recorder:
    """Runs the trackers of one attempt, on the leading node."""

    def __init__(self, attempt: Attempt, log: Log) -> None:
        self._attempt = attempt
        self._log = log
        self._publishing = False
        self._process: TrackerProcess | None = None

    @property
    def urls(self) -> dict[str, str]:
        """The URL of the run, by tracker."""
        return self._process.urls if self._process is not None else {}

    def start(self) -> None:
        """Starts the tracker process if a tracker needs it."""
        try:
            self._process = TrackerProcess(self._attempt, self._log)
        except OSError as error:
            self._log.warning("trackers can't be started; training continues", detail=str(error))

    def poll(self) -> None:
        """Logs what the trackers have reported since the last call."""
        if self._process is not None:
            self._process.poll()

    def upload_curves(self, storage: Storage | None, history: History) -> None:
        """Writes TensorBoard's file to the output, so that curves are visible during training."""
        if not self._attempt.run.tracking.tensorboard or storage is None or self._publishing:
            return
        try:
            path = f"{names.TENSORBOARD_DIR}/{_curves_name(self._attempt, history)}"
            storage.write(path, tensorboard.content(history.lines))
        except RunError as error:
            self._log.warning("TensorBoard's file couldn't be updated", detail=error.message)

    def add_files(
        self, export: Path, history: History, evaluation: Evaluation | None, figures: dict[str, float]
    ) -> None:
        """Adds the files of trackers to the result before its upload. `figures` are its metrics."""
        self._publishing = True
        config = self._attempt.run.tracking
        if config.tensorboard:
            file = export / names.TENSORBOARD_DIR / _curves_name(self._attempt, history)
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = history.lines
            scores = (
                [ScoresEvent(time=lines[-1].time, evaluation=evaluation)] if evaluation is not None and lines else []
            )
            file.write_bytes(tensorboard.content([*lines, *scores]))
        self.end(Ending(how="trained", metrics=figures), self._attempt.timeout, until=("wandb",))
        runs = sorted((self._attempt.paths.tracking / "wandb").glob("offline-run-*"))
        if config.wandb is not None and config.wandb.mode == "offline" and runs:
            target = export / names.WANDB_DIR / runs[-1].name
            shutil.copytree(runs[-1], target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("logs", "tmp"))

    def end(self, ending: Ending, timeout: float, *, until: tuple[str, ...] | None = None) -> None:
        """Announces how the attempt ended and waits for the trackers; see `TrackerProcess.end`."""
        try:
            if self._process is not None:
                self._process.end(ending, timeout, until=until)
        except OSError as error:
            self._log.warning("trackers weren't informed of the end", detail=str(error))


def _curves_name(attempt: Attempt, history: History) -> str:
    first = history.lines[:1]
    return tensorboard.file_name(first[0].time if first else 0.0, attempt.run.job.name)
