"""The story of one pod: look at the destination, fetch, check, train, upload, tell. Called by __main__ only.

PID 1 of the pod. Never imports torch: it has to outlive a rank that was killed for memory, and to tell why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finetune_api import events, names
from finetune_api.result import Result
from finetune_api.status import ArtifactStatus, CheckpointStatus, ModelStatus
from finetune_trainer import endings, fetch, history, lesson, preflight, provenance, report_file, state, telling, upload
from finetune_trainer.checkpoints import CheckpointUploader, Group, Stored
from finetune_trainer.destination import Destination
from finetune_trainer.failure import Failed
from finetune_trainer.gpu import Gpus
from finetune_trainer.log import Log
from finetune_trainer.metrics import Metrics
from finetune_trainer.node import Node
from finetune_trainer.place import Place
from finetune_trainer.progress import Poster, progress_of
from finetune_trainer.recording import Recording
from finetune_trainer.stopping import StopRequest, in_thread
from finetune_trainer.tracker import Ending, small_files
from finetune_trainer.watch import Watch

T = TypeVar("T")


class Asked(Exception):
    """We were asked to leave, and there is nothing (more) to save."""


@dataclass(frozen=True)
class Inputs:
    """What was fetched."""

    place: Place
    there: Destination
    model: fetch.ModelFacts | None = None
    data: dict[str, fetch.DataFacts] | None = None
    resume: fetch.Resume | None = None


class Supervisor:
    """One attempt on one node. `run` is the whole story; everything else is a chapter of it."""

    def __init__(self, node: Node, stop: StopRequest, log: Log) -> None:
        self._node = node
        self._stop = stop
        self._log = log
        self._gpus = Gpus()
        self._metrics = Metrics(node.run.job, self._gpus)
        self._poster = Poster(node.run.progress if node.leads else None, self._gpus, log)
        self._state = state.TrainingState()
        self._history = history.History()
        self._phase = "starting"
        self._message = ""
        self._since = time.monotonic()
        self._model: ModelStatus | None = None
        self._checkpoint: CheckpointStatus | None = None
        self._uploader: CheckpointUploader | None = None
        self._place: Place | None = None
        self._halvings = 0
        self._spent: dict[str, float] = {}
        self._recording = Recording(node, log)

    def run(self) -> Result:
        """Trains, or finds that it is done already. Never raises what was foreseen: that is the Result."""
        try:
            self._metrics.serve(self._node.run.metrics_port, self._log)
            return self._story()
        except Asked:
            return self._preempted()
        except Failed as failed:
            return self._failed(failed)
        except Exception as error:
            return self._failed(endings.own_failure(error, self._log))
        finally:
            self._enter(self._phase, self._message)
            self._poster.close()

    def _story(self) -> Result:
        inputs = self._in_thread(self._prepare)
        if inputs.there.finished is not None:
            return self._finished_before(inputs)
        self._go_on_from(inputs)
        self._enter("loading", "starting the ranks")
        ended = Watch(self._node, self._stop, self._log, self._listen, self._report).run()
        if ended.how == "stopped" or self._state.preempted is not None:
            raise Asked
        if not self._node.leads:
            if self._stop.asked:
                raise Asked
            self._in_thread(self._send_the_last)
            return Result(outcome="succeeded")
        artifact = self._in_thread(lambda: self._publish(inputs))
        self._enter("done")
        return endings.succeeded(self._state, artifact, self._model)

    # ---- before the ranks

    def _prepare(self) -> Inputs:
        """Runs in a thread, so that a request to stop is heard meanwhile."""
        node, run = self._node, self._node.run
        self._enter("fetching", f"looking at {run.output.display}")
        node.begin()
        place, there = preflight.check_destination(run, node.access, write=node.leads)
        if there.finished is not None:
            return Inputs(place, there)
        self._place, self._halvings = place, lesson.read(place, run.job)
        node.paths.halvings.write_text(str(self._halvings))
        data = fetch.data(run, node.paths, node.access, self._told)
        if node.leads and run.world.device == "cpu":
            self._enter("checking", "checking the rows")
            preflight.check_rows(run, node.paths, self._told)
            self._enter("fetching")
        model = fetch.model(run, node.paths, node.access, self._told)
        resume = fetch.checkpoint(place, there.checkpoints, run.job, node.paths.resume, self._told)
        return Inputs(place, there, model, data, resume)

    def _go_on_from(self, inputs: Inputs) -> None:
        """What an earlier attempt left: history, losses, the checkpoint that status shows."""
        run = self._node.run
        if inputs.model is not None:
            self._model = ModelStatus(
                revision=inputs.model.revision, digest=inputs.model.digest, license=inputs.model.license
            )
        if inputs.resume is not None:
            file = inputs.resume.folder / fetch.HISTORY
            lines = history.parse(file.read_text() if file.exists() else "", inputs.resume.step)
            self._history = history.History(lines)
            self._state = state.restored(lines, inputs.resume.step)
            uri = f"{inputs.place.display.rstrip('/')}/{names.checkpoint_dir(inputs.resume.step)}"
            self._checkpoint = CheckpointStatus(step=inputs.resume.step, uri=uri, time=upload.now_text())
            self._log.info("going on from a checkpoint", step=inputs.resume.step)
        if self._node.leads:
            self._recording.start()
        if self._node.leads or run.world.nodes > 1:
            self._uploader = CheckpointUploader(
                inputs.place,
                Group(run.job, self._node.rank, run.world.nodes, self._node.timing.marks_seconds),
                links=self._node.paths.scratch / "uploads",
                keep=run.checkpoint.keep,
                log=self._log,
                told=self._stored,
                patience=self._node.timing.checkpoint_patience,
            )

    # ---- while they run (the watch's thread is the main one)

    def _listen(self, event: events.Event) -> None:
        known = self._state.overfitting
        self._state = state.after(self._state, event)
        self._history.add(event)
        self._metrics.observe(event)
        if isinstance(event, events.PhaseEvent) and event.phase != "done":  # the result isn't uploaded yet
            self._enter(event.phase, event.detail)
        if isinstance(event, events.PlanEvent) and self._model is not None:
            counted = {"parameters": event.parameters, "trainable_parameters": event.trainable_parameters}
            self._model = self._model.model_copy(update=counted)
        telling.tell(self._log, event)
        telling.tell_overfitting(self._log, known, self._state.overfitting)
        if isinstance(event, events.CheckpointEvent) and self._uploader is not None:
            try:
                self._uploader.submit(event.step, Path(event.path), self._history.text(event.step), event.bytes)
            except OSError as error:
                self._log.warning("a checkpoint can't be kept for upload", step=event.step, detail=str(error))

    def _report(self) -> None:
        self._recording.listen()
        self._poster.offer(
            progress_of(
                self._state,
                attempt=self._node.run.job.attempt,
                phase=self._phase,
                message=self._message,
                checkpoint=self._checkpoint,
                model=self._model,
            )
        )

    def _stored(self, stored: Stored | None) -> None:
        if stored is None:
            self._metrics.checkpoint_failed()
            return
        self._checkpoint = stored.status
        self._recording.show_curves(self._place, self._history)
        self._metrics.checkpoint(tier="remote", seconds=stored.seconds, size=stored.bytes, at=time.time())

    # ---- after them

    def _publish(self, inputs: Inputs) -> ArtifactStatus:
        """Runs in a thread. Trains nothing again: a store that doesn't answer is waited for."""
        node, run, saved = self._node, self._node.run, self._state.saved
        if saved is None or inputs.model is None or inputs.data is None:
            raise Failed("TrainingError", "the ranks ended without a result and without an error")
        self._enter("uploading", f"uploading to {run.output.display}")
        export = Path(saved.path)
        shown, scored = self._state.samples_shown, self._state.scored
        history.write_beside(export, self._history.text(), shown, scored, node.paths.data_report)
        figures = provenance.metrics(self._state)
        self._recording.add_files(export, self._history, scored, figures)
        origin = provenance.provenance(run, inputs.model, inputs.data, self._state)
        provenance.add_to_cards(export, origin)
        origin = {**origin, "cost": report_file.cost(self._spent), "tracking": self._recording.where}
        report_file.write(export, run, saved.step, origin, figures, upload.now_text(), self._log)
        manifest = upload.result_manifest(
            export,
            kind="adapter" if run.method == "lora" else "model",
            job=run.job,
            step=saved.step,
            provenance=origin,
            metrics=figures,
        )
        artifact = upload.patiently(
            lambda: upload.publish(inputs.place, export, manifest, run.job),
            what="the upload of the result",
            patience=node.timing.upload_patience,
            log=self._log,
        )
        self._log.info("result uploaded", uri=artifact.uri, bytes=artifact.size_bytes)
        if self._uploader is not None and not self._uploader.close(node.timing.checkpoint_patience):
            self._log.warning("a checkpoint is still being uploaded; some of it may be left behind")
        try:
            upload.remove_checkpoints(inputs.place)
        except Failed as failed:
            self._log.warning("checkpoints are left behind", reason=failed.reason, detail=failed.message)
        self._recording.end(
            Ending(how="succeeded", artifact=artifact, metrics=figures, files=small_files(export)),
            node.timing.tracking_patience,
        )
        return artifact

    def _send_the_last(self) -> None:
        """Another node than the first: the next attempt needs its shards, should the result not arrive."""
        if self._uploader is not None and not self._uploader.wait(self._node.timing.checkpoint_patience):
            self._log.warning("time is up before this node's shards of the last checkpoint were uploaded")

    def _finished_before(self, inputs: Inputs) -> Result:
        """The manifest is there: an earlier attempt finished, and its last word was lost."""
        if inputs.there.finished is None:
            raise ValueError("only for a finished destination")
        manifest, data = inputs.there.finished
        self._log.info("the result is there already; nothing is trained", uri=inputs.place.display)
        self._enter("done")
        scored = history.read_scores(inputs.place)
        return endings.finished_before(manifest, upload.artifact(inputs.place, manifest, data), scored)

    def _preempted(self) -> Result:
        """Asked to leave: the checkpoint's upload gets what time is left."""
        if self._uploader is not None and not self._uploader.wait(self._stop.left):
            self._log.warning("time is up before the checkpoint was uploaded")
        self._recording.end(Ending(how="preempted"), min(5.0, self._stop.left))
        return endings.preempted(self._state, self._checkpoint, self._model)

    def _failed(self, failed: Failed) -> Result:
        """A checkpoint that is still on its way arrives first: the next attempt goes on from it."""
        self._log.error(failed.message, reason=failed.reason, rank=failed.rank, exit_code=failed.exit_code)
        if failed.reason == "OutOfMemory" and failed.rank is not None:
            halvings = max(self._halvings, self._state.halvings) + 1
            lesson.leave(self._place, self._node.run.job, halvings, self._log)
        if self._uploader is not None:
            self._uploader.wait(min(self._node.timing.checkpoint_patience, self._stop.left))
        ending = Ending(how="failed", message=f"{failed.reason}: {failed.message}")
        self._recording.end(ending, min(10.0, self._stop.left))
        result = endings.failed(failed, self._state, self._checkpoint, self._model)
        if self._node.leads:
            place, run, log, now = self._place, self._node.run, self._log, upload.now_text()
            report_file.write_failure(place, run, self._state, self._history.lines, result, self._spent, now, log)
        return result

    # ---- throughout

    def _in_thread(self, work: Callable[[], T]) -> T:
        """Does something slow while requests to stop are heard. Raises Asked when time ran out first."""

        def waiting() -> None:
            self._report()
            if self._stop.asked and (self._phase != "uploading" or self._stop.left <= 0):
                raise Asked

        return in_thread(work, waiting, self._node.timing.tick)

    def _told(self, sentence: str) -> None:
        self._message = sentence
        self._log.info(sentence)

    def _enter(self, phase: str, message: str = "") -> None:
        now = time.monotonic()
        self._metrics.spent(self._phase, now - self._since)
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._since, self._phase, self._message = now, phase, message
        self._report()
