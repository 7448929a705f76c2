"""Creates Kubernetes Events for what a person looks for in `kubectl describe`.

These are restarts, jobs that are stuck, warnings and failures. Events are sparse on purpose:
success is reported by status alone. A lost Event is logged and does no harm.
"""

from __future__ import annotations

import logging
from datetime import datetime

from finetune_api import names
from finetune_api.resource import FineTuneJob
from finetune_api.status import OverfittingStatus, Status
from finetune_operator.core.actions import CHECKING
from finetune_operator.core.status import timestamp
from finetune_operator.core.verdict import STARTING
from finetune_operator.kube.client import ApiError, KubeClient

log = logging.getLogger(__name__)

_MAX_MESSAGE_CHARACTERS = 1000


def event_of_change(before: Status, after: Status) -> tuple[str, str] | None:
    """Returns reason and message of the Event for a change of status, or None if it needs none."""
    if after.phase == "Failed" and before.phase != "Failed":
        return _reason(after, "Failed"), after.message
    if after.restarts != before.restarts:
        return "Restarted", after.message
    if _skipped(after) > _skipped(before):
        return "StepsSkipped", f"{_skipped(after)} steps have been skipped so far; the trainer's log says why"
    straggler = after.progress.straggler if after.progress else None
    before_rank = before.progress.straggler.rank if before.progress and before.progress.straggler else None
    if straggler and straggler.rank != before_rank:
        return "Straggler", (
            f"rank {straggler.rank} (pod {straggler.node} of the attempt) needs {straggler.ratio:g} times as long as "
            "the others; look at the clock, the temperature and the throttling of its GPU, and at its node"
        )
    overfitting = _overfitting(after)
    if overfitting and not _overfitting(before):
        return "Overfitting", (
            f"the validation loss rises ({overfitting.best_loss:g} at step {overfitting.best_step}, "
            f"{overfitting.loss:g} at step {overfitting.step}) while the training loss falls"
        )
    if after.data and after.data.warnings and not (before.data and before.data.warnings):
        return "DataWarning", "; ".join(after.data.warnings)
    reason = _reason(after, "Reconciling")
    stuck = after.phase == "Pending" and reason not in (CHECKING, STARTING)
    return (reason, after.message) if stuck and reason != _reason(before, "Reconciling") else None


class EventRecorder:
    """Posts Events to the API server."""

    def __init__(self, client: KubeClient, reporter: str) -> None:
        self._client = client
        self._reporter = reporter

    async def record(self, job: FineTuneJob, before: Status, after: Status, now: datetime) -> None:
        """Posts the Event for a change of status, if there is one."""
        change = event_of_change(before, after)
        if change is None:
            return
        reason, message = change
        meta, time = job.metadata, timestamp(now)
        event = {
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
            "type": "Warning",
            "reason": reason,
            "message": message[:_MAX_MESSAGE_CHARACTERS],
            "source": {"component": names.FIELD_MANAGER},
            "reportingComponent": names.FIELD_MANAGER,
            "reportingInstance": self._reporter,
            "firstTimestamp": time,
            "lastTimestamp": time,
            "count": 1,
        }
        try:
            await self._client.create("events", event)
        except ApiError as error:
            log.warning("event not created: %s", error, extra={"namespace": meta.namespace, "job": meta.name})


def _skipped(status: Status) -> int:
    return status.progress.skipped_steps if status.progress else 0


def _overfitting(status: Status) -> OverfittingStatus | None:
    return status.evaluation.overfitting if status.evaluation else None


def _reason(status: Status, kind: str) -> str:
    return next((c.reason for c in status.conditions if c.type == kind and c.status == "True"), "")
