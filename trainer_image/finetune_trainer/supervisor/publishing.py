"""Completes the folder of the result, and stores it; holds it while the storage doesn't accept it.

While a result is held, the ranks have ended: the pod computes nothing and asks the storage again
every 30 s, with the credentials that its Secret has by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.messages.manifest import Manifest
from finetune_api.status import ArtifactStatus
from finetune_trainer.destination.deposit import MENDABLE, Writer
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.manifest import Contents, build_manifest
from finetune_trainer.reporting import history
from finetune_trainer.reporting.html import writer
from finetune_trainer.reporting.run_state import RunState
from finetune_trainer.reporting.trackers.recorder import Recorder
from finetune_trainer.storage.base import Storage
from finetune_trainer.supervisor import provenance, upload
from finetune_trainer.supervisor.download import Inputs
from finetune_trainer.supervisor.node import Node


@dataclass(frozen=True)
class Finished:
    """Holds what a finished training run has come to. `seconds` is the time spent by phase."""

    inputs: Inputs
    state: RunState
    history: history.History
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Export:
    """Holds a complete result on the scratch disk, and its figures."""

    folder: Path
    manifest: Manifest
    figures: dict[str, float]


def complete(node: Node, finished: Finished, recorder: Recorder, log: Log) -> Export:
    """Adds the history, the report and the provenance to the folder that rank 0 has written.

    Raises RunError(TrainingError) if there is none.
    """
    run, state, inputs = node.run, finished.state, finished.inputs
    if state.saved is None or inputs.model is None or inputs.data is None:
        raise RunError("TrainingError", "the ranks ended without a result and without an error")
    folder = Path(state.saved.path)
    history.write_result_files(
        folder, finished.history.text(), state.samples_shown, state.scored, node.paths.data_report
    )
    figures = provenance.metrics(state)
    recorder.add_files(folder, finished.history, state.scored, figures)
    origin = provenance.provenance(run, inputs.model, inputs.data, state)
    provenance.add_to_cards(folder, origin)
    origin = {**origin, "cost": writer.cost(finished.seconds), "tracking": recorder.urls}
    contents = Contents("adapter" if run.method == "lora" else "model", run.job, state.saved.step, origin, figures)
    writer.write(folder, contents, log)
    return Export(folder, build_manifest(folder, contents), figures)


def store(
    storage: Storage,
    export: Export,
    pod: Writer,
    seconds: float,
    on_hold: Callable[[RunError, str], None],
    log: Log,
) -> ArtifactStatus:
    """Stores a result, and holds it for `seconds` while the storage doesn't accept it.

    `on_hold` receives each failure, and what it means. Raises RunError(ResultNotStored) if time is
    up.
    """
    end = f"{datetime.fromtimestamp(time.time() + seconds, UTC):%Y-%m-%d %H:%M UTC}"
    step = export.manifest.step
    manifest = pod.sign(export.manifest)
    patience = upload.Patience(
        seconds,
        on_error=lambda error: on_hold(error, f"the pod holds the result of step {step} until {end}; then it is lost"),
    )
    try:
        return upload.retry(
            lambda: upload.publish(storage, export.folder, manifest, pod.job),
            patience,
            name="the upload of the result",
            log=log,
        )
    except RunError as error:
        if error.reason not in MENDABLE:
            raise
        raise RunError(
            "ResultNotStored",
            f"the storage didn't accept the result of step {step} within output.holdSeconds={seconds:.0f}: "
            f"{error.reason}: {error.message}; it is lost, and the steps since the last stored checkpoint are trained "
            "again",
        ) from None
