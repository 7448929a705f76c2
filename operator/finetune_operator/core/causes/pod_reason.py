"""Says why a pod ended, in the words of whoever knows best. It does no I/O.

The kubelet, the scheduler and the node controller know why they removed a pod; the pod itself only
notices that it was asked to stop. What they say therefore precedes what the pod says, except for
a mistake that a person has to correct, which no other pod would survive either.
"""

from __future__ import annotations

import re
import signal

from finetune_api import reasons
from finetune_operator.core.objects import FAILED, Companion, Pod, Termination

_LOST = "DeletionByPodGC"
_TAINTED = "DeletionByTaintManager"
_DISRUPTIONS = {
    _LOST: "NodeLost",
    "PreemptionByScheduler": "Evicted",
    "PreemptionByKubeScheduler": "Evicted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
}
# What the kubelet writes into a pod's status.reason when it ends the pod itself.
_KUBELET_DEEDS = {
    "Evicted": "Evicted",
    "Preempting": "Evicted",
    "NodeShutdown": "Evicted",
    "Shutdown": "Evicted",
    "Terminated": "Evicted",  # in response to the shutdown of the node
    "NodeLost": "NodeLost",
}
_OVERDUE = "DeadlineExceeded"
_TRAINER_POD = re.compile(r".+-[0-9]+-[0-9]+-[a-z0-9]+")
_START_ERRORS = ("StartError", "ContainerCannotRun")
# Of runc and crun, if the image has no program of that name, or not for this processor.
_NO_PROGRAM = ('exec: "', "executable file", "exec format error")
_LOST_CONTAINERS = ("ContainerStatusUnknown", "Unknown")  # after a restart of the node, or of its runtime
_SIGNALED = 128  # plus the number of the signal
_REFUSAL_CHARACTERS = 400  # the cause is at the end of what the runtime reports
_DISK_TERMS = ("ephemeral", "emptydir")
_NODE_PRESSURE = "the node was low on resource"


def pod_reason(pod: Pod) -> tuple[str, str]:
    """Returns reason and message of a failed pod, from the most specific source that exists."""
    end, result = pod.termination, pod.result
    own = (result.reason, result.message) if result and result.outcome == "failed" and result.reason else None
    if own and reasons.cause(own[0]) == "user":
        return own
    if deed := _deed_of_the_cluster(pod):
        return deed
    if own:
        return own
    if result and result.outcome == "preempted":
        return "Preempted", result.message or "was asked to stop"
    if end and end.reason == "OOMKilled":
        return "OutOfMemory", f"was killed because it ran out of memory (exit code {end.exit_code})"
    if refusal := _gpu_refusal(pod):
        return "GpuUnavailable", refusal
    if end and end.exit_code == reasons.REASONS["Preempted"].exit_code:
        return "Preempted", "exited after SIGTERM"
    if pod.deleting or pod.gone:
        return "PodDeleted", "was deleted while it was running"
    if (end is None or end.exit_code == 0) and (failure := _failed_companion(pod)):
        return "PodFailed", failure
    if end:
        return _reason_of_end(end)
    return "PodFailed", pod.status_message or "ended without reporting a reason"


def _deed_of_the_cluster(pod: Pod) -> tuple[str, str] | None:
    """Returns why the cluster ended a pod, or refused it; None if it did neither."""
    message = pod.status_message or pod.disruption_message
    if _exceeds_its_disk(pod):
        return "DiskFull", pod.status_message
    if pod.lost:
        return "NodeLost", _loss(pod)
    if pod.disruption:
        return _reason_of_disruption(pod), pod.disruption_message or message or pod.disruption
    if pod.status_reason == _OVERDUE:
        return _reason_of_deadline(pod, message or pod.status_reason)
    if pod.status_reason in _KUBELET_DEEDS:
        return _KUBELET_DEEDS[pod.status_reason], message or pod.status_reason
    # The kubelet gives a reason to a pod that it refuses, whose containers are never created.
    is_refused = pod.phase == FAILED and pod.termination is None and bool(pod.status_reason)
    if is_refused and not _gpu_refusal(pod):
        return "PodRefused", f"{pod.status_reason}: {pod.status_message}".rstrip(": ")
    return None


def _reason_of_deadline(pod: Pod, message: str) -> tuple[str, str]:
    """Returns why the kubelet ended a pod at its deadline. The operator gives one to the pods of
    checks only."""
    if not _TRAINER_POD.fullmatch(pod.name):
        return "PreflightTimeout", message
    remedy = "somebody has set its spec.activeDeadlineSeconds, for example a policy of the cluster"
    return "PodDeleted", f"the kubelet ended it: {message}; {remedy}"


def _loss(pod: Pod) -> str:
    """Says why a pod counts as lost."""
    node = f"node {pod.node or 'of an unknown name'}"
    if pod.silent_since:
        return f"its {node} hasn't answered since {pod.silent_since}"
    return f"its {node} hasn't removed it, although its grace period was over at {pod.delete_by}"


def _reason_of_disruption(pod: Pod) -> str:
    """Returns the reason for a disruption. A taint with NoExecute means a node that is lost if it
    doesn't answer, else a node from which somebody removes all pods."""
    if pod.disruption == _TAINTED:
        return "Evicted" if pod.termination and not pod.silent_since else "NodeLost"
    return _DISRUPTIONS.get(pod.disruption, "Evicted")


def _exceeds_its_disk(pod: Pod) -> bool:
    """Whether the kubelet evicted a pod because it used more than its own limit; a node whose disk
    is full says that it is low on it."""
    text = pod.status_message.lower()
    is_evicted = pod.status_reason == "Evicted" and not text.startswith(_NODE_PRESSURE)
    return is_evicted and "exceed" in text and any(term in text for term in _DISK_TERMS)


def _gpu_refusal(pod: Pod) -> str:
    """Returns why a container couldn't start with its GPU; empty if that wasn't the cause.

    NVIDIA's runtime refuses a driver that is older than the image needs, and the kubelet refuses a
    GPU that became unhealthy after the pod was scheduled.
    """
    end = pod.termination
    if end and end.reason in _START_ERRORS and "nvidia" in end.message.lower():
        return end.message[-_REFUSAL_CHARACTERS:]
    if pod.status_reason == "UnexpectedAdmissionError" and "nvidia.com/" in pod.status_message:
        return pod.status_message
    return ""


def _reason_of_end(end: Termination) -> tuple[str, str]:
    """Returns reason and message of a container that left no result."""
    if end.reason in _START_ERRORS:
        return _reason_of_start_error(end.message)
    if end.reason in _LOST_CONTAINERS:
        report = f"{end.reason}: {end.message}".rstrip(": ")
        return "PodFailed", f"the kubelet has lost its container, as after a restart of the node ({report})"
    if name := _signal_name(end.exit_code):
        return "RankKilled", f"was ended by {name} (exit code {end.exit_code}) and left no message"
    return _reason_of_exit_code(end.exit_code), f"ended with exit code {end.exit_code}"


def _reason_of_start_error(text: str) -> tuple[str, str]:
    """Returns reason and message of a container that the runtime couldn't start."""
    cause = text[-_REFUSAL_CHARACTERS:]
    if any(term in text for term in _NO_PROGRAM):
        return "InvalidConfig", f"pod.image, or the chart's trainer image, doesn't have the program to start: {cause}"
    return "PodFailed", f"its container couldn't be started: {cause}"


def _failed_companion(pod: Pod) -> str:
    """Says which container beside the trainer's has failed; empty if none has."""
    for other in pod.companions:
        if (end := other.termination) and end.exit_code:
            return f"{_description(other)} {_end(end)}"
    return ""


def _description(other: Companion) -> str:
    return f"init container {other.name}" if other.is_init else f"container {other.name}"


def _end(end: Termination) -> str:
    if end.reason == "OOMKilled":
        return f"was killed because it ran out of memory (exit code {end.exit_code})"
    cause = end.message.strip().rpartition("\n")[2][-_REFUSAL_CHARACTERS:]
    return f"ended with exit code {end.exit_code}: {cause}".rstrip(": ")


def _signal_name(exit_code: int) -> str:
    """Returns the name of the signal that an exit code stands for; empty if it is no signal."""
    try:
        return signal.Signals(exit_code - _SIGNALED).name
    except ValueError:
        return ""


def _reason_of_exit_code(code: int) -> str:
    """Returns the reason of a pod without a result, if its exit code has only one."""
    matching = [reason.name for reason in reasons.REASONS.values() if reason.exit_code == code]
    return matching[0] if len(matching) == 1 else "PodFailed"
