"""Creates Kubernetes Events for what a person looks for in `kubectl describe` and `kubectl events`.

Normal ones tell the life of a job: that it started, trained its first step, stored a checkpoint,
resumed, was evaluated and succeeded. Warnings are restarts, jobs that are stuck, and failures. What
happens repeatedly is one Event with a count. A lost Event is logged and does no harm.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from finetune_api import names
from finetune_api.resource import FineTuneJob, Metadata
from finetune_api.status import CONDITION_CHECKPOINTS_STORED, OverfittingStatus, ProgressStatus, Status
from finetune_api.untrusted import shortened
from finetune_operator.core import restart_policy
from finetune_operator.core.actions import CHECKING, NODE_SILENT
from finetune_operator.core.status import MAX_MESSAGE_CHARACTERS, timestamp
from finetune_operator.core.verdict import STARTING
from finetune_operator.kube.client import ApiError, KubeClient, NotFound, Refused

log = logging.getLogger(__name__)

_MAX_MESSAGE_CHARACTERS = 1000
_SERIES_SECONDS = 1800.0  # for which an Event is counted up instead of created again


@dataclass(frozen=True)
class Happening:
    """Describes an Event without the object that it is about."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


def happenings(before: Status, after: Status) -> tuple[Happening, ...]:
    """Returns the Events for a change of status, in their order."""
    return (*_life(before, after), *_warnings(before, after))


def _life(before: Status, after: Status) -> Iterator[Happening]:
    """Yields what happened as it should."""
    if after.phase != before.phase and after.phase in ("Queued", "Suspended"):
        yield Happening("Normal", after.phase, full_message(after))
    if before.phase == "Failed" and after.phase != "Failed":
        yield Happening("Normal", "Retrying", full_message(after))
    if after.phase == "Running" and (before.phase != "Running" or before.attempt != after.attempt):
        yield Happening("Normal", "Started", f"attempt {after.attempt}: {full_message(after)}")
    if after.progress and _has_stepped(after.progress) and not _has_stepped(before.progress, after.progress.attempt):
        yield _first_step(before, after.progress)
    checkpoint = after.checkpoint
    if checkpoint and (before.checkpoint is None or before.checkpoint.step < checkpoint.step):
        yield Happening("Normal", "CheckpointStored", f"the checkpoint after step {checkpoint.step} is stored")
    headline = after.evaluation.headline if after.evaluation else ""
    if headline and headline != (before.evaluation.headline if before.evaluation else ""):
        yield Happening("Normal", "Evaluated", headline)
    if after.phase == "Succeeded" and before.phase != "Succeeded":
        yield Happening("Normal", "Succeeded", full_message(after))


def _first_step(before: Status, progress: ProgressStatus) -> Happening:
    position = f"step {progress.step} of {progress.total_steps}" if progress.total_steps else f"step {progress.step}"
    loss = "" if progress.train_loss is None else f", loss {progress.train_loss:g}"
    if before.checkpoint and progress.attempt > 1:
        origin = f"resumed from the checkpoint after step {before.checkpoint.step}"
        return Happening("Normal", "Resumed", f"attempt {progress.attempt} {origin}; it is at {position}{loss}")
    return Happening("Normal", "FirstStep", f"attempt {progress.attempt} trains: {position}{loss}")


def _has_stepped(progress: ProgressStatus | None, attempt: int | None = None) -> bool:
    return progress is not None and progress.step > 0 and attempt in (None, progress.attempt)


def _warnings(before: Status, after: Status) -> Iterator[Happening]:
    """Yields what a person should look at; at most one, since one cause has several signs."""
    for reason, message in _problems(before, after):
        yield Happening("Warning", reason, message)
        return


def _problems(before: Status, after: Status) -> Iterator[tuple[str, str]]:
    if after.phase == "Failed" and before.phase != "Failed":
        yield _true_reason(after, "Failed"), full_message(after)
    if restart_policy.total(after.restarts) > restart_policy.total(before.restarts):
        yield "Restarted", full_message(after)
    stalled = _true_reason(after, "Stalled")
    if stalled and stalled != _true_reason(before, "Stalled"):
        yield stalled, full_message(after)
    if after.reason == NODE_SILENT and before.reason != NODE_SILENT:
        yield NODE_SILENT, full_message(after)
    refused = _unstored(after)
    if refused and not _unstored(before):
        yield "CheckpointsNotStored", refused
    yield from _findings(before, after)
    reason = _true_reason(after, "Reconciling")
    is_stuck = after.phase == "Pending" and reason not in ("", CHECKING, STARTING)
    if is_stuck and reason != _true_reason(before, "Reconciling"):
        yield reason, full_message(after)


def _findings(before: Status, after: Status) -> Iterator[tuple[str, str]]:
    if _skipped(after) > _skipped(before):
        yield "StepsSkipped", f"{_skipped(after)} steps have been skipped so far; the trainer's log says why"
    straggler = after.progress.straggler if after.progress else None
    before_rank = before.progress.straggler.rank if before.progress and before.progress.straggler else None
    if straggler and straggler.rank != before_rank:
        yield (
            "Straggler",
            (
                f"rank {straggler.rank} (pod {straggler.node} of the attempt) needs {straggler.ratio:g} times as long "
                "as the others; look at the clock, the temperature and the throttling of its GPU, and at its node"
            ),
        )
    overfitting = _overfitting(after)
    if overfitting and not _overfitting(before):
        yield (
            "Overfitting",
            (
                f"the validation loss rises ({overfitting.best_loss:g} at step {overfitting.best_step}, "
                f"{overfitting.loss:g} at step {overfitting.step}) while the training loss falls"
            ),
        )
    if after.data and after.data.warnings and not (before.data and before.data.warnings):
        yield "DataWarning", "; ".join(after.data.warnings)


def full_message(status: Status) -> str:
    """Returns what status.message says, in full: from a condition, as it may be shortened there."""
    messages = (c.message for c in status.conditions)
    complete = (text for text in messages if shortened(text, MAX_MESSAGE_CHARACTERS) == status.message)
    return max((status.message, *complete), key=len)


@dataclass(frozen=True)
class _Series:
    """Holds an Event that was posted: its name, its count, and its first time (monotonic)."""

    name: str
    count: int
    since: float


class EventRecorder:
    """Posts Events to the API server."""

    def __init__(self, client: KubeClient, reporter: str) -> None:
        self._client = client
        self._reporter = reporter
        self._series: dict[str, dict[str, _Series]] = {}  # by uid of the job and reason

    async def record(self, job: FineTuneJob, before: Status, after: Status, now: datetime) -> None:
        """Posts the Events for a change of status, if there are any."""
        for happening in happenings(before, after):
            await self.post(job.metadata, happening, now)

    async def post(self, meta: Metadata, happening: Happening, now: datetime) -> None:
        """Posts one Event about a job. One that is lost is logged."""
        try:
            await self._post(meta, happening, timestamp(now))
        except ApiError as error:
            log.warning("event not created: %s", error, extra={"namespace": meta.namespace, "job": meta.name})

    def forget(self, uid: str) -> None:
        """Removes what is known about the Events of a job that is gone."""
        self._series.pop(uid, None)

    async def _post(self, meta: Metadata, happening: Happening, now: str) -> None:
        """Counts up an Event that exists, or creates one."""
        reason, message = happening.reason, happening.message[:_MAX_MESSAGE_CHARACTERS]
        posted = self._series.setdefault(meta.uid, {})
        series = posted.get(reason)
        if series and time.monotonic() - series.since < _SERIES_SECONDS:
            change = {"count": series.count + 1, "lastTimestamp": now, "message": message}
            try:
                await self._client.patch("events", meta.namespace, series.name, change)
            except (NotFound, Refused):  # the Event has expired, or the chart is older and doesn't allow this
                del posted[reason]
            else:
                posted[reason] = _Series(series.name, series.count + 1, series.since)
                return
        created = await self._client.create("events", self._event(meta, happening.kind, reason, message, now))
        posted[reason] = _Series(str(created["metadata"]["name"]), 1, time.monotonic())

    def _event(self, meta: Metadata, kind: str, reason: str, message: str, now: str) -> dict[str, object]:
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{meta.name}.", "namespace": meta.namespace},
            "involvedObject": {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": meta.name,
                "namespace": meta.namespace,
                "uid": meta.uid,
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": names.FIELD_MANAGER},
            "reportingComponent": names.FIELD_MANAGER,
            "reportingInstance": self._reporter,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }


def _skipped(status: Status) -> int:
    return status.progress.skipped_steps if status.progress else 0


def _overfitting(status: Status) -> OverfittingStatus | None:
    return status.evaluation.overfitting if status.evaluation else None


def _unstored(status: Status) -> str:
    """Returns why checkpoints or the result can't be stored; empty if they can."""
    stored = (c for c in status.conditions if c.type == CONDITION_CHECKPOINTS_STORED and c.status == "False")
    return next((f"{c.reason}: {c.message}" for c in stored), "")


def _true_reason(status: Status, kind: str) -> str:
    return next((c.reason for c in status.conditions if c.type == kind and c.status == "True"), "")
