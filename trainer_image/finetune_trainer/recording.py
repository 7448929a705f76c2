"""All trackers of an attempt, for the supervisor: nothing here raises, and nothing but the end is waited for.

TensorBoard's file is written by the supervisor itself, out of the history; the others are `tracking`'s process.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune_api import names
from finetune_api.evaluation import Evaluation
from finetune_api.events import ScoresEvent
from finetune_trainer import tensorboard
from finetune_trainer.failure import Failed
from finetune_trainer.history import History
from finetune_trainer.log import Log
from finetune_trainer.node import Node
from finetune_trainer.place import Place
from finetune_trainer.tracker import Ending
from finetune_trainer.tracking import Tracking

_ALL = 2**62


class Recording:
    """Of one attempt on node 0."""

    def __init__(self, node: Node, log: Log) -> None:
        self._node = node
        self._log = log
        self._publishing = False
        self._tracking: Tracking | None = None

    @property
    def where(self) -> dict[str, str]:
        """By tracker: where people see the run."""
        return self._tracking.where if self._tracking is not None else {}

    def start(self) -> None:
        try:
            self._tracking = Tracking(self._node, self._log)
        except OSError as error:
            self._log.warning("trackers can't be started; training goes on", detail=str(error))

    def listen(self) -> None:
        if self._tracking is not None:
            self._tracking.listen()

    def show_curves(self, place: Place | None, history: History) -> None:
        """TensorBoard's file in the destination while it trains, as of a checkpoint."""
        if not self._node.run.tracking.tensorboard or place is None or self._publishing:
            return
        try:
            lines = history.until(_ALL)
            place.write(f"{names.TENSORBOARD_DIR}/{_curves_name(self._node, history)}", tensorboard.content(lines))
        except Failed as failed:
            self._log.warning("TensorBoard's file isn't up to date", detail=failed.message)

    def add_files(self, export: Path, history: History, scored: Evaluation | None, figures: dict[str, float]) -> None:
        """Before the upload: what is recorded in files becomes part of the result."""
        self._publishing = True
        config = self._node.run.tracking
        if config.tensorboard:
            file = export / names.TENSORBOARD_DIR / _curves_name(self._node, history)
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = history.until(_ALL)
            scores = [ScoresEvent(time=lines[-1].time, evaluation=scored)] if scored is not None and lines else []
            file.write_bytes(tensorboard.content([*lines, *scores]))
        self.end(Ending(how="trained", metrics=figures), self._node.timing.tracking_patience, until=("wandb",))
        found = sorted((self._node.paths.tracking / "wandb").glob("offline-run-*"))
        if config.wandb is not None and config.wandb.mode == "offline" and found:
            target = export / names.WANDB_DIR / found[-1].name
            shutil.copytree(found[-1], target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("logs", "tmp"))

    def end(self, ending: Ending, patience: float, *, until: tuple[str, ...] | None = None) -> None:
        """See `tracking`."""
        try:
            if self._tracking is not None:
                self._tracking.end(ending, patience, until=until)
        except OSError as error:
            self._log.warning("trackers weren't told the end", detail=str(error))


def _curves_name(node: Node, history: History) -> str:
    first = history.until(_ALL)[:1]
    return tensorboard.file_name(first[0].time if first else 0.0, node.run.job.name)
