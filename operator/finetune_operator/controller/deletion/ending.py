"""Ends FineTuneJobs that are being deleted: stops their pods and has their output cleaned.

It acts, and `core.deletion.step` decides.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_api.resource import FineTuneJob, Metadata
from finetune_api.status import read
from finetune_api.untrusted import line, shortened
from finetune_operator.controller.deletion.finalizer import Finalizer, finalizers, has_finalizer
from finetune_operator.controller.event_recorder import EventRecorder, Happening
from finetune_operator.controller.executor import Executor
from finetune_operator.controller.snapshot import JobSnapshot, Key
from finetune_operator.controller.spec_reader import SpecReader
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.warning_events import WarningEvents
from finetune_operator.core.actions import Blocked, NameTaken, OutOfDate, SpecRefused
from finetune_operator.core.deletion.step import (
    CLEANED,
    NOT_CLEANED,
    Deleting,
    Step,
    next_step,
    not_cleaned,
)
from finetune_operator.core.objects import Observed
from finetune_operator.core.plan import PlanError
from finetune_operator.core.status import MAX_MESSAGE_CHARACTERS
from finetune_operator.core.verdict import needs_warning_events
from finetune_operator.kube.client import ApiError, KubeClient, Refused, Unavailable
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

_BLOCKED_SECONDS = 5.0
_TERMINATING = "being terminated"  # of the API server, about a namespace in which nothing can be created


@dataclass
class _Tries:
    """Counts what was tried for one job. It is lost with the process, which then starts anew."""

    jobs: int = 0
    blocked_since: float | None = None  # monotonic
    reported: str = ""  # the message of the last Event


@dataclass
class Ending:
    """Ends any job."""

    client: KubeClient
    state: ControllerState
    settings: Settings
    executor: Executor
    finalizer: Finalizer
    specs: SpecReader
    recorder: EventRecorder
    warning_events: WarningEvents
    _tries: dict[Key, _Tries] = field(default_factory=dict)

    async def run(self, snapshot: JobSnapshot) -> None:
        """Takes the next step of a job that is being deleted."""
        if not has_finalizer(snapshot):
            await self.executor.end(snapshot)
            return
        reading = await self.specs.read(snapshot.key, snapshot.body)
        self.specs.forget(snapshot.key)
        if reading.job is None:
            message = f"files in the output may be left, because this operator can't read the spec: {reading.problem}"
            log.warning("%s", message, extra=_extra(snapshot))
            happening = Happening("Warning", NOT_CLEANED, message)
            await self.recorder.post(
                Metadata.model_validate(snapshot.body["metadata"]), happening, self.state.clock.now()
            )
            await self._remove(snapshot)
            return
        deleting = self._deleting(snapshot, reading.job)
        await self._take(snapshot, deleting, next_step(deleting, self.state.clock.now()))

    def forget(self, key: Key) -> None:
        """Removes what is known of a job that is gone."""
        self._tries.pop(key, None)
        self.finalizer.forget(key)

    def _deleting(self, snapshot: JobSnapshot, job: FineTuneJob) -> Deleting:
        observed = Observed(
            job=job,
            attempts=snapshot.attempts,
            preflight=snapshot.preflight,
            orphaned_pods=snapshot.orphaned_pods,
        )
        return Deleting(
            observed=observed,
            since=str(snapshot.body["metadata"].get("deletionTimestamp", "")),
            finalizers=finalizers(snapshot),
            cleanup=snapshot.cleanup,
            warnings=self.warning_events.messages,
            tries=self._tries_of(snapshot).jobs,
            limit=self.settings.pods.cleanup_seconds,
        )

    async def _take(self, snapshot: JobSnapshot, deleting: Deleting, step: Step) -> None:
        match step.do:
            case "stop":
                await self._report(snapshot, step)
                await self.executor.end(snapshot)
                self.state.queue.add_after(snapshot.key, _BLOCKED_SECONDS)
            case "clean":
                await self._report(snapshot, step)
                await self._clean(snapshot, deleting)
            case "finish":
                await self._finish(snapshot, deleting, step)
            case "wait":
                await self._report(snapshot, step)
                await self._explain(snapshot)
                if step.seconds is not None:
                    self.state.queue.add_after(snapshot.key, max(0.05, step.seconds))

    async def _clean(self, snapshot: JobSnapshot, deleting: Deleting) -> None:
        """Creates the Job for the cleanup, as often as the cluster refuses it for now."""
        tries = self._tries_of(snapshot)
        try:
            await self.executor.create_cleanup(deleting.observed)
        except OutOfDate:
            self.state.queue.add(snapshot.key)
        except Blocked as error:
            tries.blocked_since = tries.blocked_since or time.monotonic()
            if _TERMINATING in str(error) or time.monotonic() - tries.blocked_since > deleting.limit:
                await self._finish(snapshot, deleting, not_cleaned(deleting.job, str(error)))
                return
            self.state.queue.add_after(snapshot.key, _BLOCKED_SECONDS)
        except (NameTaken, SpecRefused, PlanError) as error:
            await self._finish(snapshot, deleting, not_cleaned(deleting.job, str(error)))
        else:
            tries.jobs, tries.blocked_since = tries.jobs + 1, None
            self.state.queue.add(snapshot.key)

    async def _explain(self, snapshot: JobSnapshot) -> None:
        """Reads the cluster's warnings about a cleanup whose pod doesn't start."""
        uids = needs_warning_events(snapshot.cleanup) if snapshot.cleanup else ()
        if uids and await self.warning_events.refresh(snapshot.key[0], uids):
            self.state.queue.add(snapshot.key)

    async def _finish(self, snapshot: JobSnapshot, deleting: Deleting, step: Step) -> None:
        """Says what was deleted and what is left, and lets the FineTuneJob go."""
        if snapshot.cleanup:
            uids = (snapshot.cleanup.job.uid, *(pod.uid for pod in snapshot.cleanup.pods))
            self.warning_events.forget(uids)
        tries = self._tries_of(snapshot)
        if step.message and step.message != tries.reported:  # the finalizer may need another try
            tries.reported = step.message
            (log.info if step.reason == CLEANED else log.warning)("%s", step.message, extra=_extra(snapshot))
            happening = Happening("Normal" if step.reason == CLEANED else "Warning", step.reason, step.message)
            await self.recorder.post(deleting.job.metadata, happening, self.state.clock.now())
        await self._remove(snapshot)

    async def _remove(self, snapshot: JobSnapshot) -> None:
        try:
            await self.finalizer.remove(snapshot)
        except OutOfDate:
            self.state.queue.add(snapshot.key)
        except Refused as error:
            log.warning("finalizer refused: %s", error, extra=_extra(snapshot))
            self.state.queue.add_after(snapshot.key, _BLOCKED_SECONDS)
        else:
            self.forget(snapshot.key)

    async def _report(self, snapshot: JobSnapshot, step: Step) -> None:
        """Says in status why the FineTuneJob still exists."""
        before = read(snapshot.body.get("status"))
        message = shortened(line(f"being deleted: {step.message}"), MAX_MESSAGE_CHARACTERS)
        if message == before.message:
            return
        after = before.model_copy(update={"message": message})
        try:
            body = await self.client.apply_status(*snapshot.key, snapshot.resource_version, after.to_json())
        except Unavailable:
            raise
        except ApiError as error:
            log.info("status not written: %s", error, extra=_extra(snapshot))
        else:
            self.state.cache.put_body(body)

    def _tries_of(self, snapshot: JobSnapshot) -> _Tries:
        return self._tries.setdefault(snapshot.key, _Tries())


def _extra(snapshot: JobSnapshot) -> Mapping[str, str]:
    return {"namespace": snapshot.key[0], "job": snapshot.key[1]}
