"""Defines what every branch of a decision needs to know about a job. It does no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from finetune_api import names
from finetune_api.amounts import amounts
from finetune_api.status import CONDITION_SUSPENDED, Phase, Restarts, Status
from finetune_operator.core import output, plan
from finetune_operator.core.actions import OWN_DEEDS, RETRYING, SUSPENDED, SUSPENDING, DeleteJob, DesiredStatus
from finetune_operator.core.causes.failure import last_failure
from finetune_operator.core.objects import Attempt, Observed, seconds_between
from finetune_operator.core.verdict import Verdict, verdict

_VOLUME_ADVICE = {
    "shm": "; raise resources.sharedMemory",
    "tmp": "; its size is fixed, and training.compile: never keeps most compiled kernels out of it",
}


@dataclass(frozen=True)
class Case:
    """Holds an observation with the newest attempt and its verdict."""

    observed: Observed
    now: datetime
    number: int
    restarts: Restarts
    verdict: Verdict | None  # of attempt `number`; None if it has no Job, or no longer has one

    @property
    def status(self) -> Status:
        """The status as it was last written."""
        return self.observed.job.status

    @property
    def children(self) -> list[Attempt]:
        """All attempts that exist, and the preflight check."""
        return children(self.observed)

    @property
    def live(self) -> list[Attempt]:
        """Those of the children whose processes may still run."""
        return [child for child in self.children if child.is_live]

    @property
    def own_deed(self) -> str:
        """Why the operator itself has ended this attempt, one of OWN_DEEDS; empty if it hasn't."""
        return own_deed(self.status) if self.status.attempt == self.number else ""

    def desired(self, phase: Phase, reason: str, message: str, suspension: str = "") -> DesiredStatus:
        """Returns the desired status of this attempt; its failure is the previous attempt's."""
        failure = last_failure(self.observed, self.number)
        return DesiredStatus(
            phase, reason, message, self.number, self.restarts, failure, suspension=suspension, verdict=self.verdict
        )


def case_of(observed: Observed, now: datetime) -> Case:
    """Returns the case of a job that hasn't ended."""
    number, restarts = newest_attempt(observed)
    current = observed.current
    current_verdict = verdict(current, observed.warning_events) if current and current.number == number else None
    return Case(observed, now, number, restarts, output.corrected(current_verdict, observed, number))


def newest_attempt(observed: Observed) -> tuple[int, Restarts]:
    """Returns the number of the newest attempt and its restart counters.

    The newest attempt is that of status or of the newest Job, whichever is later. Its counters are
    an annotation of its Job, so they are created together with it; a retry resets them in status.
    """
    current, status = observed.current, observed.job.status
    is_retried = own_deed(status) == RETRYING and current is not None and current.number == status.attempt
    if current and current.number >= status.attempt and not is_retried:
        return current.number, current.job.restarts
    return status.attempt, status.restarts


def own_deed(status: Status) -> str:
    """Returns the operator's own deed that a status announces; empty if it announces none."""
    reasons = (c.reason for c in status.conditions if c.type == CONDITION_SUSPENDED and c.reason in OWN_DEEDS)
    return next(reasons, "")


def open_deed(status: Status, attempt: int) -> str:
    """Returns the own deed that a status has to go on announcing, since no attempt has followed."""
    deed = own_deed(status) if status.attempt == attempt else ""
    return SUSPENDING if deed == SUSPENDED else deed


def children(observed: Observed) -> list[Attempt]:
    """Returns all attempts that exist, and the preflight check."""
    return [*observed.attempts, *([observed.preflight] if observed.preflight else [])]


def delete(attempt: Attempt, *, wait: bool) -> DeleteJob:
    """Returns the action that deletes a child."""
    return DeleteJob(attempt.job.name, attempt.job.uid, attempt.job.resource_version, wait)


def is_outdated(attempt: Attempt | None, observed: Observed) -> bool:
    """Whether pods that haven't started were made from a spec or settings that have changed since.

    A Job that waits in a queue would lose its place, so only a change of the spec counts there. The
    Job of an older version has no digest, so its image is compared.
    """
    if attempt is None or attempt.job.deleting or any(pod.started or not pod.is_live for pod in attempt.pods):
        return False
    job = attempt.job
    if job.pods_digest and observed.pods_digest:
        parts = slice(0, 1) if job.suspended else slice(None)
        return job.pods_digest.split(".")[parts] != observed.pods_digest.split(".")[parts]
    return bool(job.image and observed.image) and job.image != observed.image and not job.suspended


def seconds_to_deadline(case: Case) -> float | None:
    """Returns how many seconds the job may still be active; None if it has no deadline.

    The time for which it was suspended, queued or failed doesn't count.
    """
    deadline, status = case.observed.job.spec.run_policy.active_deadline_seconds, case.status
    start = status.start_time or (case.observed.attempts[0].job.created if case.observed.attempts else "")
    if not deadline or not start:
        return None
    now = case.now
    paused = status.paused_seconds + (seconds_between(status.paused_since, now) if status.paused_since else 0)
    return deadline - (seconds_between(start, now) - paused)


def result_message(case: Case) -> str:
    """Returns what a job that has succeeded says of its result."""
    return output.message(case.verdict.result if case.verdict else None, case.observed.job)


def disk_advice(observed: Observed, message: str) -> str:
    """Returns a clause that says what to change after the volume that a message names was full;
    empty if nothing more can be said.

    The kubelet names the volume of the pod, or the container whose files were too large.
    """
    volume = re.search(r'volume "(shm|tmp)"', message)
    if volume:
        return _VOLUME_ADVICE[volume[1]]
    container = re.search(r"Container (\S+) exceeded", message)
    if container and container[1] != names.CONTAINER_TRAINER:
        return "; that container isn't the trainer's: have whoever adds it to the pods raise its limit"
    spec = observed.job.spec
    if spec.resources.scratch == "auto":
        return ""
    return f"; resources.scratch is {spec.resources.scratch}, and auto would be {_automatic_scratch(observed)}"


def _automatic_scratch(observed: Observed) -> str:
    spec = observed.job.spec
    automatic = spec.model_copy(update={"resources": spec.resources.model_copy(update={"scratch": "auto"})})
    return amounts(automatic, plan.model_bytes(observed)).scratch
