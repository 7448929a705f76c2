"""Parses raw Kubernetes objects into the small frozen values that decisions are made from.

A field that the API server omits has its zero value here. It does no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api import names
from finetune_api.messages.progress import Progress
from finetune_api.messages.result import Result, decode
from finetune_api.resource import FineTuneJob
from finetune_api.status import Restarts

Raw = Mapping[str, Any]

PENDING = "Pending"
RUNNING = "Running"
SUCCEEDED = "Succeeded"
FAILED = "Failed"


@dataclass(frozen=True)
class Termination:
    """Describes how the trainer container terminated; `message` is its termination message."""

    exit_code: int
    reason: str = ""
    message: str = ""
    finished_at: str = ""


@dataclass(frozen=True)
class Pod:
    """Describes a pod of an attempt or of a preflight check."""

    namespace: str
    name: str
    uid: str
    version: int
    job_uid: str  # of the owning batch/v1 Job
    owner_uid: str  # of the FineTuneJob, from the label
    index: int
    phase: str
    created: str
    node: str = ""
    scheduled_at: str = ""
    deleting: bool = False
    gone: bool = False  # deleted; the other fields are its last observed state
    started: bool = False  # its container is running, or has run
    service_account: str = ""
    unschedulable: str = ""  # the scheduler's message
    waiting_reason: str = ""
    waiting_message: str = ""
    disruption: str = ""  # reason of the DisruptionTarget condition
    disruption_message: str = ""
    status_reason: str = ""
    status_message: str = ""
    termination: Termination | None = None
    result: Result | None = None  # from its termination message

    @property
    def is_live(self) -> bool:
        """Whether its processes may still run."""
        return not self.gone and self.phase not in (SUCCEEDED, FAILED)


@dataclass(frozen=True)
class ChildJob:
    """Describes a batch/v1 Job that a FineTuneJob owns."""

    namespace: str
    name: str
    uid: str
    version: int
    resource_version: str
    owner_uid: str
    role: str
    attempt: int  # 0 for preflight
    created: str
    expected_pods: int = 1
    deleting: bool = False
    complete: bool = False
    failed: bool = False
    failing: bool = False  # a pod has failed; the others are being stopped
    suspended: bool = False  # by a queue such as Kueue's, or by core.gang if released_at is set
    released_at: str = ""  # when a group that was incomplete gave its nodes back
    releases: int = 0  # how often it did
    failure_reason: str = ""
    failure_message: str = ""
    finished_at: str = ""
    restarts: Restarts = field(default_factory=Restarts)
    avoided_nodes: tuple[str, ...] = ()  # their GPUs failed in earlier attempts

    @property
    def is_finished(self) -> bool:
        """Whether the Job controller has set Complete or Failed."""
        return self.complete or self.failed


@dataclass(frozen=True)
class Attempt:
    """Joins a Job (of an attempt or a preflight check) with its pods, ordered by index."""

    job: ChildJob
    pods: tuple[Pod, ...] = ()

    @property
    def number(self) -> int:
        """The attempt's number, from 1; 0 for a preflight check."""
        return self.job.attempt

    @property
    def is_live(self) -> bool:
        """Whether any of its processes is running or may still be started."""
        return any(pod.is_live for pod in self.pods) or not self.job.is_finished


@dataclass(frozen=True)
class Report:
    """Holds the newest progress of a job and when it was received (RFC 3339)."""

    progress: Progress
    time: str


@dataclass(frozen=True)
class Observed:
    """Holds everything that `decide` needs to know about one FineTuneJob, parsed and typed.

    `controller.cache.JobSnapshot` has the same children but the raw, unvalidated body; this value
    adds what isn't cached: the parsed job, warning events (by the uid of a stuck object) and the
    newest progress report.
    """

    job: FineTuneJob
    attempts: tuple[Attempt, ...] = ()
    preflight: Attempt | None = None
    orphaned_pods: tuple[Pod, ...] = ()  # live pods whose Job is gone
    warning_events: Mapping[str, str] = field(default_factory=dict)
    report: Report | None = None

    @property
    def current(self) -> Attempt | None:
        """The newest attempt that exists; None if there is none."""
        return self.attempts[-1] if self.attempts else None


def pod(raw: Raw) -> Pod:
    """Parses the raw body of a pod."""
    meta, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = meta.get("labels", {})
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled", {})
    disruption = conditions.get("DisruptionTarget", {})
    state = _container_state(status)
    waiting, terminated = state.get("waiting") or {}, state.get("terminated")
    unscheduled = not spec.get("nodeName") and scheduled.get("status") == "False"
    unschedulable = unscheduled and scheduled.get("reason") == "Unschedulable"
    disrupted = disruption.get("status") == "True"
    return Pod(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=int(meta["resourceVersion"]),
        job_uid=_controller_uid(meta, "Job"),
        owner_uid=labels.get(names.LABEL_JOB_UID, ""),
        index=int(labels.get("batch.kubernetes.io/job-completion-index", 0)),
        phase=status.get("phase", PENDING),
        created=meta.get("creationTimestamp", ""),
        node=spec.get("nodeName", ""),
        scheduled_at=scheduled.get("lastTransitionTime") or "" if scheduled.get("status") == "True" else "",
        deleting="deletionTimestamp" in meta,
        started="running" in state or "terminated" in state,
        service_account=spec.get("serviceAccountName", ""),
        unschedulable=scheduled.get("message", "") if unschedulable else "",
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        disruption=disruption.get("reason", "") if disrupted else "",
        disruption_message=disruption.get("message", "") if disrupted else "",
        status_reason=status.get("reason", ""),
        status_message=status.get("message", ""),
        termination=_termination(terminated) if terminated else None,
        result=decode(terminated.get("message")) if terminated else None,
    )


def child_job(raw: Raw) -> ChildJob:
    """Parses the raw body of a batch/v1 Job."""
    meta, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels, annotations = meta.get("labels", {}), meta.get("annotations", {})
    conditions = {c["type"]: c for c in status.get("conditions") or () if c.get("status") == "True"}
    failure = conditions.get("Failed") or conditions.get("FailureTarget") or {}
    end = conditions.get("Complete") or conditions.get("Failed") or {}
    return ChildJob(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=int(meta["resourceVersion"]),
        resource_version=meta["resourceVersion"],
        owner_uid=_controller_uid(meta, names.KIND),
        role=labels.get(names.LABEL_ROLE, ""),
        attempt=int(labels.get(names.LABEL_ATTEMPT, 0)),
        created=meta.get("creationTimestamp", ""),
        expected_pods=int(spec.get("completions") or 1),
        deleting="deletionTimestamp" in meta,
        complete="Complete" in conditions,
        failed="Failed" in conditions,
        failing="FailureTarget" in conditions or (names.LABEL_ATTEMPT in labels and bool(status.get("failed"))),
        suspended=bool(spec.get("suspend")),
        released_at=annotations.get(names.ANNOTATION_RELEASED_AT, ""),
        releases=_count(annotations.get(names.ANNOTATION_RELEASES)),
        failure_reason=failure.get("reason", ""),
        failure_message=failure.get("message", ""),
        finished_at=end.get("lastTransitionTime", ""),
        restarts=_restarts(annotations.get(names.ANNOTATION_RESTARTS)),
        avoided_nodes=_names(annotations.get(names.ANNOTATION_AVOIDED_NODES)),
    )


def attempts(jobs: Iterable[ChildJob], pods: Mapping[str, Iterable[Pod]]) -> tuple[Attempt, ...]:
    """Joins Jobs with their pods (grouped by the Job's uid), ordered by attempt number."""
    joined = (Attempt(job, tuple(sorted(pods.get(job.uid, ()), key=lambda p: (p.index, p.created)))) for job in jobs)
    return tuple(sorted(joined, key=lambda attempt: attempt.number))


def seconds_between(earlier: str, later: datetime) -> float:
    """Returns the seconds from an RFC 3339 time to `later`; 0 if the earlier one is unknown."""
    if not earlier:
        return 0.0
    return (later - datetime.fromisoformat(earlier)).total_seconds()


def _container_state(status: Raw) -> Mapping[str, Any]:
    for container in status.get("containerStatuses") or ():
        if container.get("name") == names.CONTAINER_TRAINER:
            state: Mapping[str, Any] = container.get("state") or {}
            return state
    return {}


def _termination(raw: Raw) -> Termination:
    return Termination(
        exit_code=int(raw.get("exitCode", 0)),
        reason=raw.get("reason", ""),
        message=raw.get("message", ""),
        finished_at=raw.get("finishedAt") or "",
    )


def _controller_uid(meta: Raw, kind: str) -> str:
    for owner in meta.get("ownerReferences") or ():
        if owner.get("controller") and owner.get("kind") == kind:
            return str(owner.get("uid", ""))
    return ""


def _restarts(annotation: str | None) -> Restarts:
    if not annotation:
        return Restarts()
    try:
        return Restarts.model_validate(json.loads(annotation))
    except (ValidationError, ValueError):
        return Restarts()


def _count(annotation: str | None) -> int:
    """Returns a number; 0 for an annotation that somebody has changed."""
    return int(annotation) if annotation and annotation.isdecimal() else 0


def _names(annotation: str | None) -> tuple[str, ...]:
    """Returns the names in a JSON list; none for an annotation that somebody has changed."""
    try:
        content = json.loads(annotation or "[]")
    except ValueError:
        return ()
    return tuple(name for name in content if isinstance(name, str)) if isinstance(content, list) else ()
