"""decision: the values that decide answers with: what to do, and what to say. Read by reconcile, act, status. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.status import TERMINAL_PHASES, FailureStatus, Phase, Restarts
from finetune_operator.judge import Verdict

CHECKING = "Checking"
SUSPENDING = "Suspending"
SUSPENDED = "Suspended"


@dataclass(frozen=True)
class CreateAttempt:
    """Service (where there are several nodes) and Job of an attempt."""

    number: int
    restarts: Restarts


@dataclass(frozen=True)
class CreatePreflight:
    """The Job that checks inputs and destination."""


@dataclass(frozen=True)
class DeleteJob:
    """A child Job; with `wait` it stays visible until its pods have ended."""

    name: str
    uid: str
    resource_version: str
    wait: bool


Action = CreateAttempt | CreatePreflight | DeleteJob


@dataclass(frozen=True)
class Outlook:
    """What status says after this turn; conditions and times are status's business."""

    phase: Phase
    reason: str
    message: str
    attempt: int
    restarts: Restarts
    failure: FailureStatus | None = None
    suspension: str = ""  # "", SUSPENDING or SUSPENDED
    verdict: Verdict | None = None

    @property
    def is_terminal(self) -> bool:
        return self.phase in TERMINAL_PHASES


@dataclass(frozen=True)
class Decision:
    """`say_first`: the status has to be written before the actions. `recheck` is in seconds."""

    outlook: Outlook | None  # None: a finished job's status stays as it is
    actions: tuple[Action, ...] = ()
    say_first: bool = False
    recheck: float | None = None
