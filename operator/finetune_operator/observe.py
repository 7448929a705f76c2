"""observe: raw Kubernetes objects become the small frozen values that judge and decide think with.

Called by cache, which keeps them. Pure. A field that a cluster left out is its zero value here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api import names
from finetune_api.progress import Progress
from finetune_api.resource import FineTuneJob
from finetune_api.result import Result, decode
from finetune_api.status import Restarts

Raw = Mapping[str, Any]

PENDING = "Pending"
RUNNING = "Running"
SUCCEEDED = "Succeeded"
FAILED = "Failed"


@dataclass(frozen=True)
class Termination:
    """How the trainer container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    finished_at: str = ""


@dataclass(frozen=True)
class Pod:
    """A pod of an attempt or of a preflight check."""

    namespace: str
    name: str
    uid: str
    version: int
    job_uid: str  # of the owning batch/v1 Job
    owner_uid: str  # of the FineTuneJob, as the label says
    index: int
    phase: str
    created: str
    node: str = ""
    deleting: bool = False
    gone: bool = False  # deleted; this is the last that was seen of it
    started: bool = False  # its container runs, or has run
    service_account: str = ""
    unschedulable: str = ""  # the scheduler's own words
    waiting_reason: str = ""
    waiting_message: str = ""
    disruption: str = ""  # reason of the DisruptionTarget condition
    disruption_message: str = ""
    status_reason: str = ""
    status_message: str = ""
    termination: Termination | None = None
    result: Result | None = None  # what it left as its last word

    @property
    def is_live(self) -> bool:
        """Whether its processes may still run."""
        return not self.gone and self.phase not in (SUCCEEDED, FAILED)


@dataclass(frozen=True)
class ChildJob:
    """A batch/v1 Job that a FineTuneJob owns."""

    namespace: str
    name: str
    uid: str
    version: int
    resource_version: str
    owner_uid: str
    role: str
    attempt: int  # 0 for preflight
    created: str
    pods_wanted: int = 1
    deleting: bool = False
    complete: bool = False
    failed: bool = False
    failing: bool = False  # a pod has failed; the others are being ended
    failure_reason: str = ""
    failure_message: str = ""
    finished_at: str = ""
    restarts: Restarts = field(default_factory=Restarts)

    @property
    def is_finished(self) -> bool:
        return self.complete or self.failed


@dataclass(frozen=True)
class Attempt:
    """A Job and its pods, ordered by index."""

    job: ChildJob
    pods: tuple[Pod, ...] = ()

    @property
    def number(self) -> int:
        return self.job.attempt

    @property
    def is_live(self) -> bool:
        """Whether a process of it runs or may yet be started."""
        return any(pod.is_live for pod in self.pods) or not self.job.is_finished


@dataclass(frozen=True)
class Report:
    """The newest progress of a job, and when it came in."""

    progress: Progress
    time: str


@dataclass(frozen=True)
class Observed:
    """All that is known of one FineTuneJob. `words` are what the kubelet and others said of a stuck object, by uid."""

    job: FineTuneJob
    attempts: tuple[Attempt, ...] = ()
    preflight: Attempt | None = None
    strays: tuple[Pod, ...] = ()  # live pods whose Job is gone
    words: Mapping[str, str] = field(default_factory=dict)
    report: Report | None = None

    @property
    def current(self) -> Attempt | None:
        """The newest attempt that exists."""
        return self.attempts[-1] if self.attempts else None


def pod(raw: Raw) -> Pod:
    """A pod out of its raw body."""
    meta, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = meta.get("labels", {})
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled", {})
    disruption = conditions.get("DisruptionTarget", {})
    state = _container_state(status)
    waiting, terminated = state.get("waiting") or {}, state.get("terminated")
    unplaced = not spec.get("nodeName") and scheduled.get("status") == "False"
    unschedulable = unplaced and scheduled.get("reason") == "Unschedulable"
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
    """A batch/v1 Job out of its raw body."""
    meta, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels = meta.get("labels", {})
    held = {c["type"]: c for c in status.get("conditions") or () if c.get("status") == "True"}
    failure = held.get("Failed") or held.get("FailureTarget") or {}
    end = held.get("Complete") or held.get("Failed") or {}
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
        pods_wanted=int(spec.get("completions") or 1),
        deleting="deletionTimestamp" in meta,
        complete="Complete" in held,
        failed="Failed" in held,
        failing="FailureTarget" in held or (names.LABEL_ATTEMPT in labels and bool(status.get("failed"))),
        failure_reason=failure.get("reason", ""),
        failure_message=failure.get("message", ""),
        finished_at=end.get("lastTransitionTime", ""),
        restarts=_restarts(meta.get("annotations", {}).get(names.ANNOTATION_RESTARTS)),
    )


def attempts(jobs: Iterable[ChildJob], pods: Mapping[str, Iterable[Pod]]) -> tuple[Attempt, ...]:
    """Jobs joined with their pods (given by the Job's uid), in the order of attempts."""
    joined = (Attempt(job, tuple(sorted(pods.get(job.uid, ()), key=lambda p: (p.index, p.created)))) for job in jobs)
    return tuple(sorted(joined, key=lambda attempt: attempt.number))


def seconds_between(earlier: str, later: datetime) -> float:
    """Seconds from an RFC 3339 time to `later`; 0 where the earlier one is unknown."""
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
