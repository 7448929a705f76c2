"""Decides the next step of deleting a FineTuneJob that has this operator's finalizer.

Its pods stop, then a pod deletes what output.deletionPolicy says, and then the finalizer goes,
whatever has happened: nothing keeps a FineTuneJob for good. The clock is an argument, and there is
no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from finetune_api import names
from finetune_api.resource import FineTuneJob
from finetune_operator.core.case import children
from finetune_operator.core.causes import kept_pods, lost_nodes
from finetune_operator.core.objects import Attempt, Observed, seconds_between
from finetune_operator.core.verdict import verdict

GARBAGE_COLLECTION = frozenset({"foregroundDeletion", "orphan"})
"""Finalizers of Kubernetes itself. Its garbage collector deletes or orphans all children before it
removes them, a Job for the cleanup included."""

CLEANED = "OutputCleaned"
NOT_CLEANED = "OutputNotCleaned"

MAX_TRIES = 3
"""How many times a Job for the cleanup is created that somebody deletes."""
MARGIN_SECONDS = 60.0
"""How much longer than its own deadline a Job for the cleanup is waited for, and for how long pods
that nobody stops are."""

_LOOK_SECONDS = 5.0
"""How often the cluster's warnings about a pod are read that doesn't start."""

# What a pod mounts and what is gone won't come back while its owner deletes everything.
_GONE = re.compile(r"(secret|configmap|persistentvolumeclaim|serviceaccount)s? \S+ (not found|is being deleted)", re.I)


@dataclass(frozen=True)
class Deleting:
    """Holds what is known of a FineTuneJob that is being deleted.

    `tries` is how many Jobs for the cleanup have been created, and `cleanup` is the one that
    exists. `limit` is for how many seconds such a Job may run.
    """

    observed: Observed
    since: str  # when it was deleted, RFC 3339
    finalizers: tuple[str, ...] = (names.FINALIZER,)
    cleanup: Attempt | None = None
    warnings: Mapping[str, str] = field(default_factory=dict)
    tries: int = 0
    limit: int = 600

    @property
    def job(self) -> FineTuneJob:
        """The FineTuneJob."""
        return self.observed.job


@dataclass(frozen=True)
class Step:
    """Says what to do now, and why.

    `stop` ends the job's own pods, `clean` creates the Job for the cleanup, and `finish` removes
    the finalizer, after an Event with `reason` and `message` unless they are empty. A step that
    waits is taken again after `seconds`, or as soon as something changes.
    """

    do: Literal["wait", "stop", "clean", "finish"]
    message: str = ""
    reason: str = ""
    seconds: float | None = None


def next_step(deleting: Deleting, now: datetime) -> Step:
    """Returns the next step."""
    policy = deleting.job.spec.output.deletion_policy
    if policy == "Retain":
        return Step("finish")
    if GARBAGE_COLLECTION & set(deleting.finalizers):
        return Step("wait", "waiting for the garbage collector")
    observed = lost_nodes.with_lost_pods(deleting.observed, now)
    if any(child.is_live and not child.job.deleting for child in children(observed)):
        return Step("stop", "the pods are saving a checkpoint before they stop")
    running = [pod for child in children(observed) for pod in child.pods if pod.is_live]
    pods = ", ".join(pod.name for pod in running[:3])
    if running or any(child.is_live for child in children(observed)):
        seconds = lost_nodes.seconds_until_lost(observed, now)
        return Step("wait", f"waiting for pods to stop: {pods}".rstrip(": "), seconds=seconds)
    if observed.orphaned_pods:
        return _wait_for_orphans(deleting, observed, now)
    if observed.job.status.observed_generation == 0 and not children(observed) and deleting.cleanup is None:
        return Step("finish")  # nothing has been created for it yet
    if deleting.cleanup is None and deleting.tries >= MAX_TRIES:
        return not_cleaned(deleting.job, f"the Job {names.cleanup_job_name(deleting.job.metadata.name)} was deleted")
    if deleting.cleanup is None:
        return Step(
            "clean", f"output.deletionPolicy is {policy}: a pod deletes files in {deleting.job.spec.output.uri}"
        )
    return _watch(deleting, deleting.cleanup, now)


def not_cleaned(job: FineTuneJob, why: str) -> Step:
    """Returns the step that gives up, which says what is left."""
    subject = "checkpoints" if job.spec.output.deletion_policy == "DeleteCheckpoints" else "checkpoints and the result"
    message = f"the {subject} in {job.spec.output.uri} aren't deleted, as far as they exist: {why}"
    return Step("finish", message, NOT_CLEANED)


def _wait_for_orphans(deleting: Deleting, observed: Observed, now: datetime) -> Step:
    """Waits for pods that no Job of the FineTuneJob controls, unless nobody stops them."""
    pods = ", ".join(pod.name for pod in observed.orphaned_pods[:3])
    remaining = MARGIN_SECONDS - seconds_between(deleting.since, now)
    if any(pod.deleting for pod in observed.orphaned_pods) or remaining > 0:
        limits = (lost_nodes.seconds_until_lost(observed, now), remaining if remaining > 0 else None)
        seconds = min((limit for limit in limits if limit is not None), default=None)
        return Step("wait", f"waiting for pods to stop: {pods}", seconds=seconds)
    return not_cleaned(deleting.job, f"pods of the job run on: {pods}")


def _watch(deleting: Deleting, cleanup: Attempt, now: datetime) -> Step:
    """Returns what follows from the Job for the cleanup."""
    state = verdict(kept_pods.marked(cleanup, now), deleting.warnings)
    if state.state == "succeeded":
        return Step("finish", state.result.message if state.result else "the pod left no message", CLEANED)
    timeout = f"no pod could do it within {deleting.limit} s (pods.cleanupSeconds of the chart)"
    waiting = f"{timeout}; {state.message}" if state.state == "waiting" else timeout
    if cleanup.job.failure_reason == "DeadlineExceeded":
        return not_cleaned(deleting.job, waiting)
    if state.state == "failed":
        reported = state.result.message if state.result else ""
        return not_cleaned(deleting.job, f"{state.reason}: {reported or state.message}")
    if state.state == "waiting" and _GONE.search(state.message):
        return not_cleaned(deleting.job, state.message)
    remaining = deleting.limit + MARGIN_SECONDS - seconds_between(cleanup.job.created, now)
    if remaining <= 0:
        return not_cleaned(deleting.job, waiting)
    return Step("wait", state.message, seconds=min(remaining, _LOOK_SECONDS))
