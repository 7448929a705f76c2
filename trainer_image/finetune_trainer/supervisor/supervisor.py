"""Runs one pod's attempt: checks the destination, downloads, trains, uploads and reports.

It is PID 1 of the pod. It never imports torch, as it has to outlive a rank that was killed for
memory, and to report why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from finetune_api import names
from finetune_api.messages import events
from finetune_api.messages.manifest import Manifest
from finetune_api.messages.result import Result
from finetune_api.status import ModelStatus
from finetune_trainer.destination.deposit import Deposit
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.reporting import event_log, history, run_state
from finetune_trainer.reporting.gpus.watch import Gpus
from finetune_trainer.reporting.html import writer
from finetune_trainer.reporting.phase_clock import PhaseClock
from finetune_trainer.reporting.progress import Poster, progress_of
from finetune_trainer.reporting.prometheus import Metrics
from finetune_trainer.reporting.trackers.recorder import Recorder
from finetune_trainer.reporting.trackers.worker import Ending, small_files
from finetune_trainer.storage.base import Storage
from finetune_trainer.supervisor import (
    exit_reason,
    oom_backoff,
    outcomes,
    publishing,
    upload,
)
from finetune_trainer.supervisor.checkpoint_uploader import (
    CheckpointUploader,
    FailedUpload,
    StoredCheckpoint,
    ThisNode,
)
from finetune_trainer.supervisor.download import Inputs
from finetune_trainer.supervisor.monitor import Monitor
from finetune_trainer.supervisor.node import Node
from finetune_trainer.supervisor.preparation import Preparation
from finetune_trainer.supervisor.rendezvous.nodes import rendezvous
from finetune_trainer.supervisor.signals import StopRequest, in_thread

T = TypeVar("T")


class StopRequested(Exception):
    """Reports that the pod was asked to stop, and that nothing is left to save."""


class Supervisor:
    """Runs one attempt on one node."""

    def __init__(self, node: Node, stop: StopRequest, log: Log) -> None:
        self._node = node
        self._stop = stop
        self._log = log
        self._gpus = Gpus(log)
        self._metrics = Metrics(node.run.job, self._gpus, node.gpus_of_job)
        self._poster = Poster(node.run.progress if node.leads else None, self._gpus, log)
        self._state = run_state.RunState()
        self._history = history.History()
        self._phases = PhaseClock()
        self._model: ModelStatus | None = None
        self._deposit = Deposit(node.run, leads=node.leads)
        self._steps = event_log.StepLines(log)
        self._uploader: CheckpointUploader | None = None
        self._storage: Storage | None = None
        self._memory = oom_backoff.MemoryWatch(node.run.job, node.rank, log)
        self._recorder = Recorder(node.tracked_attempt, log)

    def run(self) -> Result:
        """Trains, unless the result exists already. Every failure is returned as a Result."""
        return self._result().model_copy(update={"signer": self._deposit.public_key})

    def _result(self) -> Result:
        try:
            self._metrics.serve(self._node.run.metrics_port, self._log)
            return self._run_attempt()
        except StopRequested:
            return self._succeeded() if self._deposit.artifact else self._preempted()
        except Exception as error:
            if self._deposit.artifact:  # it is whole in the destination, whatever happened after that
                self._log.warning("the attempt failed after its result was stored", detail=str(error))
                return self._succeeded()
            return self._failed(error if isinstance(error, RunError) else outcomes.unexpected(error, self._log))
        finally:
            self._enter(self._phases.phase, self._phases.message)
            self._memory.end()
            self._poster.close()

    def _run_attempt(self) -> Result:
        inputs = self._in_thread(self._prepare)
        if inputs.destination.finished is not None:
            return self._already_finished(inputs.storage, *inputs.destination.finished)
        self._resume(inputs)
        self._enter("loading", "starting the ranks")
        with rendezvous(self._node, self._log) as node:
            end = Monitor(node, self._stop, self._log, self._handle_event, self._tick).run()
        leads = self._node.leads
        if end.how == "stopped" or self._state.preempted is not None or (self._stop.requested and not leads):
            raise StopRequested
        if not leads:
            self._in_thread(self._finish_uploads)
            return Result(outcome="succeeded")
        self._in_thread(lambda: self._publish(inputs))
        self._enter("done")
        return self._succeeded()

    # ---- before the ranks

    def _prepare(self) -> Inputs:
        """Downloads the inputs. It runs in a thread, so a request to stop is noticed meanwhile."""
        preparation = Preparation(self._node, self._deposit, self._poster, self._enter, self._set_message, self._log)
        storage, destination = preparation.destination()
        if destination.finished is not None:
            return Inputs(storage, destination)
        self._storage = storage
        inputs = preparation.inputs(storage, destination)
        saved = oom_backoff.saved_halvings(inputs.resume.folder if inputs.resume else None)
        self._memory.start(storage, self._node.run.world.nodes, self._node.run.memory_restarts, saved)
        self._node.paths.halvings.write_text(str(self._memory.halvings))
        return inputs

    def _resume(self, inputs: Inputs) -> None:
        """Restores what an earlier attempt reported, and starts the trackers and the uploader."""
        run = self._node.run
        if inputs.model is not None:
            self._model = inputs.model.status(complete=True)
        if inputs.resume is not None:
            file = inputs.resume.folder / names.CHECKPOINT_HISTORY
            lines = history.parse(file.read_text() if file.exists() else "", inputs.resume.step)
            self._history = history.History(lines)
            self._state = run_state.restored(lines, inputs.resume.step)
            self._deposit.add_checkpoint(upload.checkpoint_status(inputs.storage, inputs.resume.step))
            self._log.info("resuming from a checkpoint", step=inputs.resume.step)
        if self._node.leads:
            self._recorder.start()
        if self._node.leads or run.world.nodes > 1:
            self._uploader = CheckpointUploader(
                inputs.storage,
                ThisNode.of(self._node, self._deposit.writer),
                links=self._node.paths.scratch / "uploads",
                keep=run.checkpoint.keep,
                log=self._log,
                on_result=self._handle_upload,
                timeout=self._node.timing.checkpoint_timeout,
            )

    # ---- while the ranks run; the monitor calls these in the main thread

    def _handle_event(self, event: events.Event) -> None:
        overfitting = self._state.overfitting
        self._state = run_state.after(self._state, event)
        self._history.add(event)
        self._metrics.observe(event)
        if isinstance(event, events.PhaseEvent) and event.phase != "done":  # the result isn't uploaded yet
            self._enter(event.phase, event.detail)
        if isinstance(event, events.PlanEvent) and self._model is not None:
            counts = {"parameters": event.parameters, "trainable_parameters": event.trainable_parameters}
            self._model = self._model.model_copy(update=counts)
        event_log.log_event(self._log, event)
        if isinstance(event, events.StepEvent):
            self._steps.step(self._state, time.monotonic())
        event_log.log_overfitting(self._log, overfitting, self._state.overfitting)
        if isinstance(event, events.CheckpointEvent) and self._uploader is not None:
            try:
                self._uploader.submit(event.step, Path(event.path), self._history.text(event.step), event.bytes)
            except OSError as error:
                self._log.warning("a checkpoint can't be linked for its upload", step=event.step, detail=str(error))

    def _report(self) -> None:
        self._recorder.poll()
        self._memory.look(self._state.halvings)
        self._poster.offer(
            progress_of(
                self._state,
                attempt=self._node.run.job.attempt,
                phase=self._phases.phase,
                message=self._phases.message,
                stored=self._deposit.report(self._state.step),
                model=self._model,
            )
        )

    def _tick(self) -> None:
        self._report()
        if self._deposit.loss is not None:
            raise self._deposit.loss

    def _handle_upload(self, end: StoredCheckpoint | FailedUpload) -> None:
        """Shows a stored checkpoint, or a failure to store one, in status and metrics."""
        if isinstance(end, FailedUpload):
            self._deposit.add_failure(end.error, is_lost=end.is_lost)
            if end.is_lost:
                self._metrics.count_failed_checkpoint()
            return
        self._deposit.add_checkpoint(end.status)
        self._recorder.upload_curves(self._storage, self._history)
        self._metrics.record_checkpoint(tier="remote", seconds=end.seconds, size=end.bytes, at=time.time())

    # ---- after the ranks

    def _publish(self, inputs: Inputs) -> None:
        """Completes the result and stores it, in a thread; waits for the storage to accept it."""
        node, run = self._node, self._node.run
        self._enter("uploading", f"uploading to {run.output.display}")
        finished = publishing.Finished(inputs, self._state, self._history, self._phases.seconds)
        export = publishing.complete(node, finished, self._recorder, self._log)
        pod = self._deposit.writer
        artifact = publishing.store(inputs.storage, export, pod, run.hold_seconds, self._hold_result, self._log)
        self._deposit.add_result(artifact, export.manifest.step)
        self._log.info("result uploaded", uri=artifact.uri, bytes=artifact.size_bytes)
        if self._uploader is not None and not self._uploader.close(node.timing.checkpoint_timeout):
            self._log.warning("a checkpoint is still being uploaded; some of its files may remain in the destination")
        try:
            upload.remove_checkpoints(inputs.storage, run.job)
        except RunError as error:
            self._log.warning("can't delete the checkpoints", reason=error.reason, detail=error.message)
        self._recorder.end(
            Ending(how="succeeded", artifact=artifact, metrics=export.figures, files=small_files(export.folder)),
            node.timing.tracking_timeout,
        )

    def _hold_result(self, error: RunError, consequence: str) -> None:
        self._deposit.hold(error, consequence)
        self._phases.message = f"{consequence}: {error.message}"

    def _finish_uploads(self) -> None:
        """Waits for this node's shards: the next attempt needs them if node 0 can't upload."""
        if self._uploader is not None and not self._uploader.wait(self._node.timing.checkpoint_timeout):
            self._log.warning("time is up before this node's shards of the last checkpoint were uploaded")

    def _already_finished(self, storage: Storage, manifest: Manifest, data: bytes) -> Result:
        """Handles a destination that has an earlier attempt's result, whose message was lost."""
        self._log.info("the result exists already; nothing is trained", uri=storage.display)
        self._enter("done")
        scored = history.read_scores(storage)
        return outcomes.already_finished(manifest, upload.artifact(storage, manifest, data), scored)

    def _preempted(self) -> Result:
        """Handles a request to stop: the checkpoint's upload has the time that is left."""
        if self._uploader is not None and not self._uploader.wait(self._stop.seconds_left):
            self._log.warning("time is up before the checkpoint was uploaded")
        self._recorder.end(Ending(how="preempted"), min(5.0, self._stop.seconds_left))
        self._deposit.release_if_empty(self._storage, self._log)
        return outcomes.preempted(self._state, self._deposit.checkpoint, self._model)

    def _failed(self, error: RunError) -> Result:
        """Handles a failure, after a checkpoint's upload: the next attempt resumes from it."""
        error = exit_reason.with_gpu_faults(error, self._gpus.faults())
        if self._state.plan is not None and self._state.plan.smallest_micro_batches:
            error = exit_reason.with_smallest_micro_batches(error)
        self._log.error(error.message, reason=error.reason, rank=error.rank, exit_code=error.exit_code)
        if error.reason == "OutOfMemory" and error.rank is not None:
            halvings, run = max(self._memory.halvings, self._state.halvings) + 1, self._node.run
            oom_backoff.write(self._storage, run.job, halvings, run.memory_restarts + 1, self._log)
        if self._uploader is not None:  # a storage that has refused the result for long isn't waited for again
            wait = self._uploader.close if error.reason == "ResultNotStored" else self._uploader.wait
            wait(min(self._node.timing.checkpoint_timeout, self._stop.seconds_left))
        self._deposit.release_if_empty(self._storage, self._log)
        ending = Ending(how="failed", message=f"{error.reason}: {error.message}")
        self._recorder.end(ending, min(10.0, self._stop.seconds_left))
        result = outcomes.failed(error, self._state, self._deposit.checkpoint, self._model)
        if self._node.leads:
            failed = writer.FailedRun(result, self._state, self._history.lines, self._phases.seconds)
            writer.write_failure(self._storage, self._node.run, failed, self._log)
        return result

    def _succeeded(self) -> Result:
        return outcomes.succeeded(self._state, self._deposit.artifact, self._model)

    # ---- throughout

    def _in_thread(self, work: Callable[[], T]) -> T:
        """Runs slow work and reports progress. Raises StopRequested if the pod must stop first; an
        upload may use the time until the pod is killed."""

        def check() -> None:
            """Reports progress, and raises StopRequested if the work must be abandoned."""
            self._report()
            if self._stop.requested and (self._phases.phase != "uploading" or self._stop.seconds_left <= 0):
                raise StopRequested

        return in_thread(work, check, self._node.timing.tick)

    def _set_message(self, sentence: str) -> None:
        self._phases.message = sentence
        self._log.info(sentence)

    def _enter(self, phase: str, message: str = "") -> None:
        self._metrics.add_phase_seconds(*self._phases.enter(phase, message))
        self._report()
