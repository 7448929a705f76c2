"""judge: what happened to an attempt, told by its Job, its pods and what others said of them.

Called by decide. Pure: a verdict follows from what is observed alone, so that it is the same after a crash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_api import reasons
from finetune_api.result import Result
from finetune_operator import observe
from finetune_operator.observe import Attempt, Pod

State = Literal["waiting", "running", "ending", "succeeded", "failed"]

# Reasons that are no word of reasons.REASONS: an attempt that waits isn't over. What else it may wait for is told in
# the kubelet's word: FailedMount, CreateContainerConfigError …
STARTING = "PodsStarting"
UNSCHEDULABLE = "Unschedulable"
IMAGE_PULL = "ImagePullBackOff"

_DISRUPTIONS = {
    "DeletionByPodGC": "NodeLost",
    "DeletionByTaintManager": "NodeLost",
    "PreemptionByScheduler": "Evicted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
}
_DISK_WORDS = ("ephemeral", "emptydir")
_IMAGE_WORDS = ("ErrImagePull", "ImagePullBackOff")  # by turns, for the same trouble
_QUIET_WAITING = ("", "ContainerCreating", "PodInitializing")

# One dead pod takes the others with it, so the group's cause is the most telling of its pods' reasons: first what a
# person or the program did, then what the cluster did, last what is only a consequence.
_TELLING = (
    ("OutOfMemory", "NonFiniteLoss", "TrainingError"),
    ("NodeLost",),
    ("DiskFull", "StorageUnavailable"),
    ("RankKilled",),
    ("Evicted",),
    ("Stalled",),
    ("PodFailed", "PeerLost", "Preempted", "PodDeleted"),
)


@dataclass(frozen=True)
class Verdict:
    """How an attempt stands. `reason` is one of reasons.REASONS where it failed."""

    state: State
    reason: str
    message: str
    result: Result | None = None

    @property
    def cause(self) -> reasons.Cause:
        return reasons.cause(self.reason)


def verdict(attempt: Attempt, words: dict[str, str] | None = None) -> Verdict:
    """`words` are what was said of a stuck pod or Job, by its uid."""
    job, pods = attempt.job, attempt.pods
    live = [pod for pod in pods if pod.is_live]
    if (job.complete or _all_succeeded(attempt)) and not live:
        return Verdict("succeeded", "Trained", "all pods completed", _leading_result(pods))
    if job.failed and not live:
        return _root_cause(attempt)
    if job.is_finished or job.failing or job.deleting or _has_lost_a_pod(attempt):
        return Verdict("ending", "PodsEnding", _ending(live))
    if len(_present(pods)) >= job.pods_wanted and all(pod.started for pod in live):
        return Verdict("running", "Running", f"{_count(job.pods_wanted)} of {job.name} run")
    return _waiting(attempt, words or {})


def needs_words(attempt: Attempt) -> tuple[str, ...]:
    """uids of the objects of a waiting attempt of which only the cluster's events can say what they wait for."""
    if verdict(attempt).state != "waiting":
        return ()
    quiet = tuple(
        pod.uid
        for pod in attempt.pods
        if pod.is_live and not pod.started and not pod.unschedulable and pod.waiting_reason in _QUIET_WAITING
    )
    return quiet if len(_present(attempt.pods)) >= attempt.job.pods_wanted else (attempt.job.uid, *quiet)


def _all_succeeded(attempt: Attempt) -> bool:
    """A pod of every index has done its part; the Job controller says so of the Job a second or two later."""
    done = {pod.index for pod in attempt.pods if pod.phase == observe.SUCCEEDED}
    return not attempt.job.failed and done >= set(range(attempt.job.pods_wanted))


def _present(pods: tuple[Pod, ...]) -> tuple[Pod, ...]:
    return tuple(pod for pod in pods if not pod.gone)


def _has_lost_a_pod(attempt: Attempt) -> bool:
    """One dead pod ends an attempt, even where the Job controller hasn't said so yet; a check is tried again."""
    return attempt.number > 0 and any(pod.phase == observe.FAILED for pod in attempt.pods)


def _waiting(attempt: Attempt, words: dict[str, str]) -> Verdict:
    for pod in attempt.pods:
        if pod.is_live and not pod.started and pod.unschedulable:
            return Verdict("waiting", UNSCHEDULABLE, f"pod {pod.name}: {pod.unschedulable}")
    for pod in attempt.pods:
        if pod.is_live and pod.waiting_reason not in _QUIET_WAITING:
            reason = IMAGE_PULL if pod.waiting_reason in _IMAGE_WORDS else pod.waiting_reason
            return Verdict("waiting", reason, f"pod {pod.name}: {reason}: {pod.waiting_message}".rstrip(": "))
    for pod in attempt.pods:
        if pod.is_live and not pod.started and pod.uid in words:
            return Verdict("waiting", _first_word(words[pod.uid]), f"pod {pod.name}: {words[pod.uid]}")
    if attempt.job.uid in words and len(_present(attempt.pods)) < attempt.job.pods_wanted:
        said = words[attempt.job.uid]
        return Verdict("waiting", _first_word(said), f"job {attempt.job.name}: {said}")
    started = sum(pod.started for pod in attempt.pods)
    return Verdict("waiting", STARTING, f"{started} of {_count(attempt.job.pods_wanted)} run")


def _first_word(said: str) -> str:
    """An event's reason, as words puts it before the message."""
    return said.partition(":")[0] or STARTING


def _ending(live: list[Pod]) -> str:
    if not live:
        return "the attempt is ending"
    return f"{_count(len(live))} still to end: {', '.join(pod.name for pod in live[:3])}"


def _root_cause(attempt: Attempt) -> Verdict:
    told = [_pod_verdict(pod) for pod in attempt.pods if pod.phase != observe.SUCCEEDED]
    if not told:
        reason = "PodDeleted" if attempt.job.failure_reason != "DeadlineExceeded" else "DeadlineExceeded"
        return Verdict("failed", reason, f"no pod of {attempt.job.name} is left; {attempt.job.failure_message}")
    return min(told, key=lambda entry: (_rank(entry[1].reason), entry[0]))[1]


def _rank(reason: str) -> int:
    if reasons.cause(reason) == "user":
        return -1
    return next((rank for rank, group in enumerate(_TELLING) if reason in group), len(_TELLING))


def _pod_verdict(pod: Pod) -> tuple[str, Verdict]:
    """When, and why, a pod ended badly."""
    end = pod.termination
    finished = end.finished_at if end else ""
    reason, message = _pod_reason(pod, pod.result)
    told = pod.result or _bare_result(pod, reason)
    return finished or "9", Verdict("failed", reason, f"pod {pod.name}: {message}".rstrip(": "), told)


def _pod_reason(pod: Pod, result: Result | None) -> tuple[str, str]:
    end = pod.termination
    if result and result.outcome == "failed" and result.reason:
        return result.reason, result.message
    if pod.disruption:
        return _disruption(pod)
    if result and result.outcome == "preempted":
        return "Preempted", result.message or "was asked to leave"
    if end and end.reason == "OOMKilled":
        return "OutOfMemory", f"was killed for memory (exit code {end.exit_code})"
    if pod.status_reason in ("Evicted", "NodeLost", "NodeShutdown", "Terminated"):
        return _disruption(pod)
    if end and end.exit_code == _exit_code("Preempted"):
        return "Preempted", "ended after SIGTERM"
    if pod.deleting or pod.gone:
        return "PodDeleted", "was deleted while it ran"
    if end:
        return _reason_of_exit_code(end.exit_code), f"ended with exit code {end.exit_code}"
    return "PodFailed", f"{pod.status_reason} {pod.status_message}".strip() or "ended without telling why"


def _disruption(pod: Pod) -> tuple[str, str]:
    message = pod.disruption_message or pod.status_message
    if any(word in pod.status_message.lower() for word in _DISK_WORDS):
        return "DiskFull", pod.status_message
    reason = _DISRUPTIONS.get(pod.disruption) or ("NodeLost" if pod.status_reason != "Evicted" else "Evicted")
    return reason, message


def _exit_code(reason: str) -> int:
    return reasons.REASONS[reason].exit_code


def _reason_of_exit_code(code: int) -> str:
    """For a pod that left no result: only codes that are one reason's alone."""
    matching = [reason.name for reason in reasons.REASONS.values() if reason.exit_code == code]
    return matching[0] if len(matching) == 1 else "PodFailed"


def _bare_result(pod: Pod, reason: str) -> Result:
    end = pod.termination
    tail = end.message if end else ""
    return Result(outcome="failed", reason=reason, exit_code=end.exit_code if end else None, log_tail=tail)


def _leading_result(pods: tuple[Pod, ...]) -> Result | None:
    """Node 0 uploads, so its pod's result tells of the artifact."""
    for pod in pods:
        if pod.phase == observe.SUCCEEDED and pod.result:
            return pod.result
    return None


def _count(pods: int) -> str:
    return "1 pod" if pods == 1 else f"{pods} pods"
