"""recorder: Kubernetes Events for what a person wants to see in `kubectl describe`: restarts, what is stuck, and ends
that aren't good. Sparse on purpose: what goes well is told by status alone.

Called by reconcile after a status was written. A lost Event is logged and does no harm.
"""

from __future__ import annotations

import logging
from datetime import datetime

from finetune_api import names
from finetune_api.resource import FineTuneJob
from finetune_api.status import OverfittingStatus, Status
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.decision import CHECKING
from finetune_operator.judge import STARTING
from finetune_operator.status import timestamp

log = logging.getLogger(__name__)

_LONGEST_NOTE = 1000


def worth_telling(before: Status, after: Status) -> tuple[str, str] | None:
    """Reason and message of the Event for a change of status, if it deserves one."""
    if after.phase == "Failed" and before.phase != "Failed":
        return _reason(after, "Failed"), after.message
    if after.restarts != before.restarts:
        return "Restarted", after.message
    if _skipped(after) > _skipped(before):
        return "StepsSkipped", f"{_skipped(after)} steps so far changed nothing; the trainer's log tells why"
    overfits = _overfitting(after)
    if overfits and not _overfitting(before):
        return "Overfitting", (
            f"the validation loss rises ({overfits.best_loss:g} at step {overfits.best_step}, {overfits.loss:g} at "
            f"step {overfits.step}) while the training loss falls"
        )
    if after.data and after.data.warnings and not (before.data and before.data.warnings):
        return "DataWarning", "; ".join(after.data.warnings)
    reason = _reason(after, "Reconciling")
    stuck = after.phase == "Pending" and reason not in (CHECKING, STARTING)
    return (reason, after.message) if stuck and reason != _reason(before, "Reconciling") else None


class Recorder:
    """Posts them."""

    def __init__(self, cluster: Cluster, reporter: str) -> None:
        self._cluster = cluster
        self._reporter = reporter

    async def record(self, job: FineTuneJob, before: Status, after: Status, now: datetime) -> None:
        """Posts the Event that the change deserves."""
        told = worth_telling(before, after)
        if told is None:
            return
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
            "reason": told[0],
            "message": told[1][:_LONGEST_NOTE],
            "source": {"component": names.FIELD_MANAGER},
            "reportingComponent": names.FIELD_MANAGER,
            "reportingInstance": self._reporter,
            "firstTimestamp": time,
            "lastTimestamp": time,
            "count": 1,
        }
        try:
            await self._cluster.create("events", event)
        except ApiError as error:
            log.warning("an Event is lost: %s", error, extra={"job": meta.name})


def _skipped(status: Status) -> int:
    return status.progress.skipped_steps if status.progress else 0


def _overfitting(status: Status) -> OverfittingStatus | None:
    return status.evaluation.overfitting if status.evaluation else None


def _reason(status: Status, kind: str) -> str:
    return next((c.reason for c in status.conditions if c.type == kind and c.status == "True"), "")
