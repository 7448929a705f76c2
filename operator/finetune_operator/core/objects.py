"""Defines the small frozen values that decisions are made from; `core.parsing` makes them from raw
objects. It does no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from finetune_api import untrusted as u
from finetune_api.messages.progress import Progress
from finetune_api.messages.result import Result
from finetune_api.resource import FineTuneJob
from finetune_api.status import Restarts

PENDING = "Pending"
RUNNING = "Running"
SUCCEEDED = "Succeeded"
FAILED = "Failed"

_POD_NAME = re.compile(r"([a-z0-9.-]+?)-(?:[0-9]+-[0-9]+|check|clean)-[a-z0-9]+")
MAX_PODS = 1024  # of one attempt, as spec.distribution.nodes has it


@dataclass(frozen=True)
class Termination:
    """Describes how the trainer container terminated; `message` is its termination message."""

    exit_code: int
    reason: str = ""
    message: str = ""
    finished_at: str = ""


@dataclass(frozen=True)
class Companion:
    """Describes a container beside the trainer's: a network profile's, or one that the cluster
    injects into every pod, such as a proxy's."""

    name: str
    is_init: bool = False  # it runs before the trainer; one that runs beside it ends with it
    running: bool = False
    waiting_reason: str = ""
    waiting_message: str = ""
    termination: Termination | None = None


@dataclass(frozen=True)
class Pod:
    """Describes a pod of an attempt, of a preflight check or of a cleanup."""

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
    addresses: frozenset[str] = frozenset()  # of its network, once it has them
    deleting: bool = False
    delete_by: str = ""  # when its grace period ends, if it is being deleted
    silent_since: str = ""  # when its node stopped answering, by the cluster's own report
    lost: bool = False  # by core.lost_nodes: its node hasn't answered for too long
    gone: bool = False  # deleted; the other fields are its last observed state
    unwatched: bool = False  # the watch lost it, by a label, so its state has to be looked up
    started: bool = False  # its container is running, or has run
    service_account: str = ""
    unschedulable: str = ""  # the scheduler's message
    unscheduled_reason: str = ""  # the scheduler's reason: Unschedulable, SchedulingGated …
    prepared: bool = False  # its volumes are mounted, and it has a network
    waiting_reason: str = ""
    waiting_message: str = ""
    disruption: str = ""  # reason of the DisruptionTarget condition
    disruption_message: str = ""
    status_reason: str = ""
    status_message: str = ""
    termination: Termination | None = None
    result: Result | None = None  # from its termination message
    companions: tuple[Companion, ...] = ()
    abandoned: bool = False  # by core.causes.kept_pods: its trainer ended long before the pod

    @property
    def keepers(self) -> tuple[str, ...]:
        """The names of the containers that run on in a pod whose trainer has ended."""
        if self.termination is None or self.phase in (SUCCEEDED, FAILED):
            return ()
        return tuple(other.name for other in self.companions if other.running and not other.is_init)

    @property
    def job_name(self) -> str:
        """The name of the FineTuneJob whose child it is called like; empty if of none."""
        match = _POD_NAME.fullmatch(self.name)
        return match[1] if match else ""

    @property
    def is_live(self) -> bool:
        """Whether its processes may still run, as far as anybody can know."""
        return not self.gone and not self.lost and self.phase not in (SUCCEEDED, FAILED)


@dataclass(frozen=True)
class ChildJob:
    """Describes a batch/v1 Job that a FineTuneJob owns."""

    namespace: str
    name: str
    uid: str
    version: int
    resource_version: str
    owner_uid: str  # of the FineTuneJob; empty if the Job isn't called as one of its children
    role: str
    attempt: int  # 0 for preflight and cleanup
    created: str
    owner_name: str = ""
    expected_pods: int = 1
    deleting: bool = False
    complete: bool = False
    failed: bool = False
    failing: bool = False  # a pod has failed; the others are being stopped
    suspended: bool = False  # by a queue such as Kueue's, or by core.gang if released_at is set
    suspended_by: str = ""  # the field manager that set spec.suspend, if it isn't the operator
    image: str = ""  # of its pods
    pods_digest: str = ""  # of what its pods were made from; empty for a Job of an older version
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
    """Joins a Job (of an attempt, a preflight check or a cleanup) with its pods, by index."""

    job: ChildJob
    pods: tuple[Pod, ...] = ()

    @property
    def number(self) -> int:
        """The attempt's number, from 1; 0 for a preflight check and a cleanup."""
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
    image: str = ""  # that pods would have if they were created now
    pods_digest: str = ""  # of what pods would be made from now

    @property
    def current(self) -> Attempt | None:
        """The newest attempt that exists; None if there is none."""
        return self.attempts[-1] if self.attempts else None


def attempts(jobs: Iterable[ChildJob], pods: Mapping[str, Iterable[Pod]]) -> tuple[Attempt, ...]:
    """Joins Jobs with their pods (grouped by the Job's uid), ordered by attempt number."""
    joined = (Attempt(job, tuple(sorted(pods.get(job.uid, ()), key=lambda p: (p.index, p.created)))) for job in jobs)
    return tuple(sorted(joined, key=lambda attempt: attempt.number))


def seconds_between(earlier: str, later: datetime) -> float:
    """Returns the seconds from an RFC 3339 time to `later`; 0 if the earlier one is unknown."""
    start = u.seconds(earlier)
    return 0.0 if start is None else later.timestamp() - start
