"""Says why a pod ended, in the words of whoever knows best. It does no I/O.

The kubelet, the scheduler and the node controller know why they removed a pod; the pod itself only
notices that it was asked to stop. What they say therefore precedes what the pod says, except for
a mistake that a person has to correct, which no other pod would survive either.
"""

from __future__ import annotations

from finetune_api import reasons
from finetune_operator.core.objects import Pod

_LOST = "DeletionByPodGC"
_DISRUPTIONS = {
    _LOST: "NodeLost",
    "DeletionByTaintManager": "NodeLost",
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
# What the kubelet writes if it refuses a pod that the scheduler has sent to it.
_REFUSALS = (
    "UnexpectedAdmissionError",
    "UnexpectedPredicateFailureType",
    "TopologyAffinityError",
    "NodeAffinity",
    "NodePorts",
    "PodOSSelectorNodeLabelDoesNotMatch",
    "PodOSNotSupported",
    "AppArmor",
    "SysctlForbidden",
    "InvalidNodeInfo",
)
_OUT_OF = "OutOf"  # OutOfcpu, OutOfmemory, OutOfephemeral-storage, OutOfnvidia.com/gpu …
_START_ERRORS = ("StartError", "ContainerCannotRun")
_REFUSAL_CHARACTERS = 400  # the cause is at the end of what the runtime reports
_DISK_TERMS = ("ephemeral", "emptydir")


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
    if end:
        return _reason_of_exit_code(end.exit_code), f"ended with exit code {end.exit_code}"
    return "PodFailed", f"{pod.status_reason} {pod.status_message}".strip() or "ended without reporting a reason"


def _deed_of_the_cluster(pod: Pod) -> tuple[str, str] | None:
    """Returns why the cluster ended a pod, or refused it; None if it did neither."""
    message = pod.status_message or pod.disruption_message
    if _exceeds_its_disk(pod):
        return "DiskFull", pod.status_message
    if pod.lost:
        since = f" since {pod.silent_since}" if pod.silent_since else ""
        return "NodeLost", f"its node {pod.node or 'of an unknown name'} hasn't answered{since}"
    if pod.disruption:
        return _DISRUPTIONS.get(pod.disruption, "Evicted"), pod.disruption_message or message or pod.disruption
    if pod.status_reason == _OVERDUE:  # only a preflight pod has a deadline
        return "PreflightTimeout", message or pod.status_reason
    if pod.status_reason in _KUBELET_DEEDS:
        return _KUBELET_DEEDS[pod.status_reason], message or pod.status_reason
    is_refused = pod.status_reason in _REFUSALS or pod.status_reason.startswith(_OUT_OF)
    if is_refused and not _gpu_refusal(pod):
        return "PodRefused", f"{pod.status_reason}: {pod.status_message}".rstrip(": ")
    return None


def _exceeds_its_disk(pod: Pod) -> bool:
    """Whether the kubelet evicted a pod because it used more than its own limit; a node whose disk
    is full says that it is low on it."""
    text = pod.status_message.lower()
    is_evicted = pod.status_reason == "Evicted"
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


def _reason_of_exit_code(code: int) -> str:
    """Returns the reason of a pod without a result, if its exit code has only one."""
    matching = [reason.name for reason in reasons.REASONS.values() if reason.exit_code == code]
    return matching[0] if len(matching) == 1 else "PodFailed"
