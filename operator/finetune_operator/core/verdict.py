"""Judges an attempt by its Job, its pods and the warning events about them.

A verdict depends only on what is observed, so it is the same after a crash. There is no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from finetune_api import reasons
from finetune_api.messages.result import Result
from finetune_operator.core import objects
from finetune_operator.core.causes.pod_reason import pod_reason
from finetune_operator.core.objects import Attempt, ChildJob, Observed, Pod

State = Literal["queued", "waiting", "running", "ending", "succeeded", "failed"]

# Reasons of a waiting attempt. They aren't in reasons.REASONS, which lists how attempts end. Other
# reasons to wait are the kubelet's own: FailedMount, CreateContainerConfigError …
STARTING = "PodsStarting"
UNSCHEDULABLE = "Unschedulable"
IMAGE_PULL = "ImagePullBackOff"
QUEUED = "Queued"

_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff")  # the kubelet alternates between them
_NORMAL_WAITING = ("", "ContainerCreating", "PodInitializing")
_GATED = "SchedulingGated"
# Warnings that no longer hold once a pod has a node, or once its volumes and its network are there.
_OF_SCHEDULING = ("FailedScheduling",)
_OF_PREPARATION = ("FailedMount", "FailedMapVolume", "FailedAttachVolume", "FailedCreatePodSandBox", "NetworkNotReady",
                   "FailedPrepareDynamicResources")  # fmt: skip

# One dead pod takes the others down with it, so the root cause is the pod reason with the highest
# precedence: first what a person or the program did, then what the cluster did, last what is only a
# consequence.
_PRECEDENCE = (
    ("GpuFault", "GpuUnavailable"),  # the other pods lose their connections, or raise errors of NCCL
    ("OutOfMemory", "NonFiniteLoss", "TrainingError"),
    ("NodeLost",),
    ("PodRefused",),
    ("StorageUnavailable",),
    ("RankKilled",),
    ("Evicted",),
    ("Stalled",),
    ("PodFailed", "PeerLost", "Preempted", "PodDeleted"),
)
_CONSEQUENCES = _PRECEDENCE[-1]
_OVERDUE = "DeadlineExceeded"  # of a Job


@dataclass(frozen=True)
class Verdict:
    """Describes the state of an attempt. If it failed, `reason` is one of reasons.REASONS."""

    state: State
    reason: str
    message: str
    result: Result | None = None

    @property
    def cause(self) -> reasons.Cause:
        """The cause of the reason, which decides about a restart."""
        return reasons.cause(self.reason)


def verdict(attempt: Attempt, warning_events: Mapping[str, str] | None = None) -> Verdict:
    """Returns the verdict on an attempt.

    `warning_events` holds "reason: message" of the last warning about a stuck pod or Job, by its
    uid.
    """
    attempt = replace(attempt, pods=_without_replaced(attempt.pods))
    job, pods = attempt.job, attempt.pods
    live = [pod for pod in pods if pod.is_live]
    if (job.complete or _all_succeeded(attempt)) and not live:
        return Verdict("succeeded", "Trained", "all pods have completed", _leading_result(pods))
    # The Job controller waits for pods on lost nodes, whose end nobody will report, and for pods
    # that another container keeps.
    is_over = any(pod.lost or pod.abandoned for pod in pods)
    if (job.failed or is_over) and not live:
        return _root_cause(attempt)
    ends = job.is_finished or job.failing or job.deleting or is_over
    if job.suspended and not ends and not live:
        return Verdict("queued", QUEUED, _suspension(job))
    deleted = [pod.name for pod in live if pod.deleting]
    if ends or job.suspended or deleted or _has_failed_pod(attempt):
        cause = f"{_suspension(job)}; " if job.suspended and not ends else ""
        if deleted and not ends and not job.suspended:
            cause = f"pod {deleted[0]} is being deleted; "
        return Verdict("ending", "PodsEnding", cause + _first_failure(attempt) + _ending(live))
    if len(_present(pods)) >= job.expected_pods and all(pod.started for pod in live):
        if keepers := _keepers(live):
            return Verdict("running", "Running", keepers)
        if 0 < len(live) < job.expected_pods:
            part = f"{len(live)} of {job.expected_pods} pods of {job.name} still run; the others have completed"
            return Verdict("running", "Running", part)
        verb = "is" if job.expected_pods == 1 else "are"
        return Verdict("running", "Running", f"{_count(job.expected_pods)} of {job.name} {verb} running")
    return _waiting(attempt, warning_events or {})


def needs_warning_events(attempt: Attempt) -> tuple[str, ...]:
    """Returns the uids of a waiting attempt's objects that only the cluster's events can explain.

    Their own status doesn't show what they are waiting for.
    """
    if verdict(attempt).state != "waiting":
        return ()
    unexplained = tuple(
        pod.uid
        for pod in attempt.pods
        if pod.is_live and not pod.started and not pod.unschedulable and not _waiting_of(pod)[0]
    )
    missing_pods = len(_present(attempt.pods)) < attempt.job.expected_pods
    return (attempt.job.uid, *unexplained) if missing_pods else unexplained


def _suspension(job: ChildJob) -> str:
    """Says who has suspended a Job, and what resumes it."""
    if not job.suspended_by:
        return f"Job {job.name} is suspended until a queue, such as Kueue's, admits it"
    return f"Job {job.name} was suspended by {job.suspended_by}; it runs once its spec.suspend is false"


def needs_service(observed: Observed) -> bool:
    """Whether the pods of a group look for each other by the name of their Service.

    They do so from their start until they have met, which is before the first step.
    """
    attempt, report = observed.current, observed.report
    if attempt is None or attempt.job.expected_pods == 1 or attempt.job.is_finished or attempt.job.suspended:
        return False
    has_stepped = report is not None and report.progress.attempt == attempt.number and report.progress.step > 0
    return not has_stepped and any(pod.started for pod in attempt.pods)


def _all_succeeded(attempt: Attempt) -> bool:
    """Whether a pod of every index has succeeded.

    The Job controller reports completion a second or two later.
    """
    expected = attempt.job.expected_pods
    done = {pod.index for pod in attempt.pods if pod.phase == objects.SUCCEEDED and pod.index < expected}
    return not attempt.job.failed and len(done) >= expected


def _present(pods: tuple[Pod, ...]) -> tuple[Pod, ...]:
    return tuple(pod for pod in pods if not pod.gone)


def _without_replaced(pods: tuple[Pod, ...]) -> tuple[Pod, ...]:
    """Returns the pods without those that are gone and have a successor of the same index."""
    existing = {pod.index for pod in _present(pods)}
    return tuple(pod for pod in pods if not pod.gone or pod.index not in existing)


def _has_failed_pod(attempt: Attempt) -> bool:
    """Whether a pod has failed, which ends an attempt even before the Job controller reports it.

    A preflight check doesn't end by that: its Job retries it. Nor does an attempt end by the pods
    that stopped because a queue had suspended their Job: those are gone, and the Job didn't count
    them.
    """
    return attempt.number > 0 and any(pod.phase == objects.FAILED for pod in _present(attempt.pods))


def _keepers(live: list[Pod]) -> str:
    """Names the containers that run on after their trainers have ended; empty if there are none."""
    pod = next((pod for pod in live if pod.keepers), None)
    if pod is None:
        return ""
    return f"pod {pod.name}: the trainer has ended, but container {', '.join(pod.keepers)} still runs"


def _waiting(attempt: Attempt, warning_events: Mapping[str, str]) -> Verdict:
    waiting = [pod for pod in attempt.pods if pod.is_live and not pod.started]
    for pod in waiting:
        if pod.unschedulable:
            reason = pod.unscheduled_reason or UNSCHEDULABLE
            state: State = "queued" if reason == _GATED else "waiting"
            return Verdict(state, reason, f"pod {pod.name}: {pod.unschedulable}")
    for pod in attempt.pods:
        reason, message = _waiting_of(pod)
        if pod.is_live and reason:
            return Verdict("waiting", reason, f"pod {pod.name}: {message}")
    for pod in waiting:
        warning = warning_events.get(pod.uid, "")
        if warning and not _is_obsolete(warning, pod):
            return Verdict("waiting", _reason_of_warning(warning), f"pod {pod.name}: {warning}")
    if attempt.job.uid in warning_events and len(_present(attempt.pods)) < attempt.job.expected_pods:
        warning = warning_events[attempt.job.uid]
        return Verdict("waiting", _reason_of_warning(warning), f"job {attempt.job.name}: {warning}")
    started = sum(pod.started for pod in attempt.pods)
    return Verdict("waiting", STARTING, f"{started} of {_count(attempt.job.expected_pods)} running")


def _waiting_of(pod: Pod) -> tuple[str, str]:
    """Returns why a container of a pod can't start, as a reason and a message; empty if none waits
    for something unusual. The trainer waits in vain for another container that can't start."""
    others = () if pod.started else pod.companions
    for container in (None, *others):
        reason, message = (
            (container.waiting_reason, container.waiting_message)
            if container
            else (pod.waiting_reason, pod.waiting_message)
        )
        if reason not in _NORMAL_WAITING:
            reason = IMAGE_PULL if reason in _IMAGE_REASONS else reason
            subject = f"container {container.name}: " if container else ""
            return reason, f"{subject}{reason}: {message}".rstrip(": ")
    return "", ""


def _is_obsolete(warning: str, pod: Pod) -> bool:
    """Whether a warning is about something that has succeeded since."""
    reason = _reason_of_warning(warning)
    return (bool(pod.node) and reason in _OF_SCHEDULING) or (pod.prepared and reason in _OF_PREPARATION)


def _reason_of_warning(warning: str) -> str:
    """Returns the reason of a warning event, which precedes its message."""
    return warning.partition(":")[0] or STARTING


def _first_failure(attempt: Attempt) -> str:
    """Returns what has ended an attempt whose other pods are still stopping, as a clause."""
    ended = replace(attempt, pods=tuple(pod for pod in attempt.pods if pod.lost or pod.phase == objects.FAILED))
    if not ended.pods:
        return ""
    cause = _root_cause(ended)
    return f"{cause.reason}: {cause.message}; "


def _ending(live: list[Pod]) -> str:
    if not live:
        return "the attempt is ending"
    return f"waiting for {_count(len(live))} to stop: {', '.join(pod.name for pod in live[:3])}"


def _root_cause(attempt: Attempt) -> Verdict:
    """Returns the verdict on the pod whose failure caused the others."""
    job = attempt.job
    failures = [_pod_verdict(pod) for pod in attempt.pods if pod.phase != objects.SUCCEEDED]
    cause = min(failures, key=lambda failure: (_precedence(failure[1].reason), failure[0]), default=("", None))[1]
    if job.failure_reason == _OVERDUE and (cause is None or cause.reason in _CONSEQUENCES):
        # The operator sets no deadline for it, and pods only notice that they are to stop.
        message = (
            f"the Job controller stopped the pods of {job.name}: {_OVERDUE}: {job.failure_message}; somebody has set "
            "the Job's spec.activeDeadlineSeconds, for example a policy of the cluster"
        )
        return Verdict("failed", "PodDeleted", message, cause.result if cause else None)
    if cause is None:
        return Verdict("failed", "PodDeleted", f"no pod of {job.name} exists anymore; {job.failure_message}")
    return cause


def _precedence(reason: str) -> int:
    """Returns the sort key of a reason: the lowest one is the root cause."""
    if reasons.cause(reason) == "user":
        return -1
    return next((index for index, group in enumerate(_PRECEDENCE) if reason in group), len(_PRECEDENCE))


def _pod_verdict(pod: Pod) -> tuple[str, Verdict]:
    """Returns when a pod failed (a sort key; unknown times come last), and the verdict on it."""
    ends = (pod.termination, *(other.termination for other in pod.companions))
    finished = next((end.finished_at for end in ends if end), "")
    reason, message = pod_reason(pod)
    result = pod.result or _bare_result(pod, reason)
    return finished or "9", Verdict("failed", reason, f"pod {pod.name}: {message}".rstrip(": "), result)


def _bare_result(pod: Pod, reason: str) -> Result:
    """Returns a result for a pod that left none; its termination message is the end of its log."""
    end = pod.termination
    tail = end.message if end else ""
    return Result(outcome="failed", reason=reason, exit_code=end.exit_code if end else None, log_tail=tail)


def _leading_result(pods: tuple[Pod, ...]) -> Result | None:
    """Returns the result of the first succeeded pod that has one; pods are ordered by index.

    Node 0 uploads the artifact, so its pod's result describes it.
    """
    for pod in pods:
        if pod.phase == objects.SUCCEEDED and pod.result:
            return pod.result
    return None


def _count(pods: int) -> str:
    return "1 pod" if pods == 1 else f"{pods} pods"
