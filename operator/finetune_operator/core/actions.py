"""Defines what a decision consists of: actions, the desired status, and when to requeue; and how an
action can fail.

It contains values and exceptions only and does no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_api.status import TERMINAL_PHASES, FailureStatus, Phase, Restarts
from finetune_operator.core.verdict import Verdict

CHECKING = "Checking"
SUSPENDING = "Suspending"
SUSPENDED = "Suspended"
DEADLINE = "DeadlineExceeded"
REPLACING = "Replacing"
NODE_SILENT = "NodeSilent"
RETRYING = "Retrying"

OWN_DEEDS = (SUSPENDING, SUSPENDED, DEADLINE, REPLACING, RETRYING)
"""Why the operator itself ends an attempt, as reasons of the condition Suspended. They are written
before the deed, so that its consequences never count as failures."""


@dataclass(frozen=True)
class CreateAttempt:
    """Stands for creating the Job of an attempt and, if it has several nodes, its Service.

    Its pods avoid `avoided_nodes`, whose GPUs failed in earlier attempts.
    """

    number: int
    restarts: Restarts
    avoided_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CreatePreflight:
    """Stands for creating the Job that checks the inputs and the output destination."""


@dataclass(frozen=True)
class DeleteJob:
    """Stands for deleting a child Job; with `wait` it stays visible until its pods have stopped."""

    name: str
    uid: str
    resource_version: str
    wait: bool


@dataclass(frozen=True)
class ReleaseGroup:
    """Stands for suspending the Job of a group that holds a part of the nodes that it needs.

    `releases` counts how often this has happened to the Job, including this time.
    """

    name: str
    uid: str
    resource_version: str
    releases: int
    at: datetime


@dataclass(frozen=True)
class ResumeGroup:
    """Stands for resuming a Job that ReleaseGroup has suspended."""

    name: str
    uid: str
    resource_version: str


Action = CreateAttempt | CreatePreflight | DeleteJob | ReleaseGroup | ResumeGroup


@dataclass(frozen=True)
class DesiredStatus:
    """Says what status has to report; `core.status` adds conditions and times."""

    phase: Phase
    reason: str
    message: str
    attempt: int
    restarts: Restarts
    failure: FailureStatus | None = None
    suspension: str = ""  # empty, or one of OWN_DEEDS
    stalled: bool = False  # only a person can continue the job, which hasn't failed
    verdict: Verdict | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether the job has succeeded or failed for good."""
        return self.phase in TERMINAL_PHASES


@dataclass(frozen=True)
class Decision:
    """Holds the outcome of one reconcile.

    `status_first` means that the status has to be written before the actions are carried out.
    `requeue_after` is in seconds.
    """

    desired: DesiredStatus | None  # None: a finished job's status stays as it is
    actions: tuple[Action, ...] = ()
    status_first: bool = False
    requeue_after: float | None = None

    @property
    def creates_pods(self) -> bool:
        """Whether one of the actions creates pods."""
        return any(isinstance(action, CreateAttempt | CreatePreflight) for action in self.actions)


class OutOfDate(Exception):
    """Is raised if the cache was out of date.

    It was refreshed, and the decision must be made again.
    """


class NameTaken(Exception):
    """Is raised if an object of another owner has the name that a child needs."""


class SpecRefused(Exception):
    """Is raised if the API server rejects an object; only another spec can change that."""


class Blocked(Exception):
    """Is raised if the cluster can't accept an object yet.

    The cause is a quota, a missing permission, or an earlier object that is still being deleted.
    """
