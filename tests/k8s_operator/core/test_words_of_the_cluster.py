"""What kubelets, schedulers and the Job controller say of a pod is what status says: tables of raw
objects."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.messages.result import Result
from finetune_operator.core.verdict import needs_warning_events
from k8s_operator.support.raw_objects import (
    BACKOFF,
    CREATING,
    DONE,
    INITIALIZING,
    PREEMPTED,
    RUNNING,
    Outcome,
    Raw,
    ago,
    disrupted,
    job,
    outcome,
    pod,
    terminated,
    unscheduled,
    waiting,
)

_NO_PYTHON = (
    "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: "
    'unable to start container process: error during container init: exec: "python": executable file not found in $PATH'
)
_NO_CGROUP = (
    "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: "
    "unable to apply cgroup configuration: failed to write 4194304: device or resource busy"
)
_OLD_PRESSURE = (
    "The node was low on resource: ephemeral-storage. Container trainer was using 21Gi, which exceeds its request of "
    "20Gi. "
)
_TAINT = "Taint manager: deleting due to NoExecute taint"


def _evicted(message: str) -> Raw:
    return pod("Failed", terminated(137), reason="Evicted", message=message)


def _refused(reason: str, message: str) -> Raw:
    return pod("Failed", reason=reason, message=f"Pod was rejected: {message}")


# A failed pod, the reason that status has, and a part of its message.
ENDS: dict[str, tuple[Raw, str, str]] = {
    "SIGKILL that nobody explains": (pod("Failed", terminated(137)), "RankKilled", "SIGKILL (exit code 137)"),
    "a crash of the supervisor": (pod("Failed", terminated(139)), "RankKilled", "SIGSEGV (exit code 139)"),
    "an abort": (pod("Failed", terminated(134)), "RankKilled", "SIGABRT (exit code 134)"),
    "the node restarted": (pod("Failed", terminated(255, "Unknown")), "PodFailed", "restart of the node (Unknown)"),
    "the runtime restarted": (
        pod("Failed", terminated(137, "ContainerStatusUnknown", "The container could not be located when the pod was "
                                                                "terminated")),
        "PodFailed", "could not be located"),
    "an image without python": (
        pod("Failed", terminated(128, "StartError", _NO_PYTHON)), "InvalidConfig",
        "pod.image, or the chart's trainer image, doesn't have the program"),
    "an image of another processor": (
        pod("Failed", terminated(128, "StartError", 'exec: "/usr/bin/python": exec format error')), "InvalidConfig",
        "exec format error"),
    "an older runtime": (
        pod("Failed", terminated(127, "ContainerCannotRun", 'exec: "python": stat python: no such file or directory')),
        "InvalidConfig", "stat python"),
    "a runtime in trouble": (
        pod("Failed", terminated(128, "StartError", _NO_CGROUP)), "PodFailed", "device or resource busy"),
    "the node's disk is full, in older words": (_evicted(_OLD_PRESSURE), "Evicted", "low on resource"),
    "the node's disk is full, in newer words": (
        _evicted("The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 900Mi. "
                 "Container trainer was using 5Gi, request is 20Gi, has larger consumption of ephemeral-storage. "),
        "Evicted", "low on resource"),
    "the node has no inodes": (_evicted("The node was low on resource: inodes. "), "Evicted", "inodes"),
    "the node has no process ids": (_evicted("The node was low on resource: pids. "), "Evicted", "pids"),
    "a node with pressure takes no pods": (
        pod("Failed", reason="Evicted", message="Pod was rejected: The node had condition: [DiskPressure]. "),
        "Evicted", "DiskPressure"),
    "shared memory": (
        _evicted('Usage of EmptyDir volume "shm" exceeds the limit "1Gi". '), "DiskFull",
        "raise resources.sharedMemory"),
    "caches": (
        _evicted('Usage of EmptyDir volume "tmp" exceeds the limit "2147483648". '), "DiskFull", "training.compile"),
    "the files of an injected container": (
        _evicted('Container istio-proxy exceeded its local ephemeral storage limit "1Gi". '), "DiskFull",
        "isn't the trainer's"),
    "no processors": (_refused("OutOfcpu", "Node didn't have enough resource: cpu"), "PodRefused", "OutOfcpu"),
    "no GPUs": (_refused("OutOfnvidia.com/gpu", "x"), "PodRefused", "OutOfnvidia.com/gpu"),
    "no volumes": (
        _refused("VolumeAttachmentLimitExceeded", "Node has insufficient volume attachment capacity"), "PodRefused",
        "VolumeAttachmentLimitExceeded"),
    "a taint of this second": (_refused("TaintToleration", "Predicate TaintToleration failed"), "PodRefused", "Taint"),
    "a reason of a newer kubelet": (_refused("PodFeatureUnsupported", "x"), "PodRefused", "PodFeatureUnsupported"),
    "a shutdown": (
        pod("Failed", reason="NodeShutdown", message="Pod was rejected as the node is shutting down."), "Evicted",
        "down"),
    "a critical pod": (
        pod("Failed", reason="Preempting", message="Preempted in order to admit critical pod"), "Evicted", "critical"),
    "somebody empties a node by a taint": (
        pod("Failed", terminated(143, result=PREEMPTED), conditions=[disrupted("DeletionByTaintManager", _TAINT)]),
        "Evicted", "NoExecute"),
    "a device's taint": (
        pod("Failed", terminated(143, result=PREEMPTED), conditions=[disrupted("DeletionByDeviceTaintManager", "x")]),
        "Evicted", "x"),
    "a taint of a node that is gone": (
        pod("Failed", conditions=[disrupted("DeletionByTaintManager", _TAINT)]), "NodeLost", "NoExecute"),
    "a deleted node": (
        pod("Failed", conditions=[disrupted("DeletionByPodGC", "PodGC: node no longer exists")]), "NodeLost", "exists"),
    "a deadline that a policy gives to the pod": (
        pod("Failed", terminated(143, result=PREEMPTED), reason="DeadlineExceeded",
            message="Pod was active on the node longer than the specified deadline"),
        "PodDeleted", "somebody has set its spec.activeDeadlineSeconds"),
    "an init container fails": (
        pod("Failed", INITIALIZING, inits={"vault-agent": terminated(1, message="permission denied")}), "PodFailed",
        "init container vault-agent ended with exit code 1: permission denied"),
    "an init container runs out of memory": (
        pod("Failed", INITIALIZING, inits={"istio-init": terminated(137, "OOMKilled")}), "PodFailed",
        "init container istio-init was killed because it ran out of memory"),
    "a proxy runs out of memory after the trainer": (
        pod("Failed", terminated(0, result=DONE), containers={"istio-proxy": terminated(137, "OOMKilled")}),
        "PodFailed", "container istio-proxy was killed because it ran out of memory"),
    "the trainer fails first": (
        pod("Failed", terminated(71, result=Result(outcome="failed", reason="NonFiniteLoss", message="NaN")),
            containers={"istio-proxy": terminated(1)}), "NonFiniteLoss", "NaN"),
}  # fmt: skip


@pytest.mark.parametrize(("failed_pod", "reason", "part"), ENDS.values(), ids=ENDS)
def test_status_says_what_the_cluster_says_of_a_pods_end(failed_pod: Raw, reason: str, part: str) -> None:
    end = outcome([job(1, 1, BACKOFF)], [failed_pod], spec={"resources": {"scratch": "20Gi"}})
    assert end.status.failure is not None
    assert (end.status.failure.reason, part in end.text) == (reason, True), end.text
    assert len(end.status.message) <= 110


@pytest.mark.parametrize("pods", [[], [pod("Failed", terminated(143, result=PREEMPTED))]], ids=["gone", "stopped"])
def test_a_deadline_that_a_policy_gives_to_the_job_is_named(pods: list[Raw]) -> None:
    late = ("Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
    end = outcome([job(1, 1, late)], pods)
    assert end.status.failure is not None
    assert end.status.failure.reason == "PodDeleted"
    assert "somebody has set the Job's spec.activeDeadlineSeconds" in end.text
    assert "runPolicy.activeDeadlineSeconds" not in end.status.failure.hint
    assert end.status.restarts.infrastructure == 1


_GATED = pod(
    "Pending", node="", gates=["example.com/quota"],
    conditions=[unscheduled("SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates")],
)  # fmt: skip
_NOT_FOUND = waiting("ImagePullBackOff", 'Back-off pulling image "proxy:1": not found')
_MOUNTED = {"type": "PodReadyToStartContainers", "status": "True"}

# A pod that hasn't started, Events about it, and the phase, the reason and the words of status.
WAITS: dict[str, tuple[Raw, str, tuple[str, str, str]]] = {
    "scheduling gates": (_GATED, "", ("Queued", "SchedulingGated", "example.com/quota")),
    "an error of the scheduler": (
        pod("Pending", node="", conditions=[unscheduled("SchedulerError", 'running PreFilter plugin "x": timeout')]),
        "", ("Pending", "SchedulerError", "timeout")),
    "an init container that is started again and again": (
        pod("Pending", INITIALIZING, inits={"vault-agent": waiting("CrashLoopBackOff", "back-off 5m0s restarting")}),
        "", ("Pending", "CrashLoopBackOff", "container vault-agent: CrashLoopBackOff: back-off 5m0s")),
    "the image of a network profile's container": (
        pod("Pending", INITIALIZING, inits={"tcpx": _NOT_FOUND}), "",
        ("Pending", "ImagePullBackOff", "container tcpx: ImagePullBackOff")),
    "the image of an injected container": (
        pod("Pending", CREATING, containers={"istio-proxy": _NOT_FOUND}), "",
        ("Pending", "ImagePullBackOff", "container istio-proxy: ImagePullBackOff")),
    "the trainer's own image goes first": (
        pod("Pending", waiting("ErrImagePull", "manifest unknown"), containers={"istio-proxy": _NOT_FOUND}), "",
        ("Pending", "ImagePullBackOff", "manifest unknown")),
    "a pod that has got its node and pulls its image": (
        pod("Pending", CREATING), "FailedScheduling: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        ("Starting", "", "0 of 1 pod running")),
    "a pod that has got its volumes and pulls its image": (
        pod("Pending", CREATING, conditions=[_MOUNTED]), 'FailedMount: secret "s3" not found',
        ("Starting", "", "0 of 1 pod running")),
    "a pod without its volumes": (
        pod("Pending", CREATING), 'FailedMount: secret "s3" not found', ("Pending", "FailedMount", "not found")),
    "a volume that is attached elsewhere": (
        pod("Pending", CREATING), "FailedAttachVolume: Multi-Attach error for volume",
        ("Pending", "FailedAttachVolume", "Multi-Attach")),
}  # fmt: skip


@pytest.mark.parametrize(("pending", "warning", "expected"), WAITS.values(), ids=WAITS)
def test_status_says_what_a_pod_waits_for(pending: Raw, warning: str, expected: tuple[str, str, str]) -> None:
    now = outcome([job()], [pending], "Starting", warnings={"pod-1-0": warning} if warning else {})
    assert (now.status.phase, now.status.reason) == expected[:2]
    assert expected[2] in now.text
    assert now.decision.actions == ()


def test_events_are_read_only_for_what_no_status_explains() -> None:
    def asks(pending: Raw) -> bool:
        attempt = outcome([job()], [pending], "Starting").observed.attempts[0]
        return bool(needs_warning_events(attempt))

    assert asks(pod("Pending", CREATING))
    assert not asks(pod("Pending", INITIALIZING, inits={"tcpx": _NOT_FOUND}))
    assert not asks(_GATED)


def test_pods_that_have_completed_are_not_called_running() -> None:
    done, uploading = pod("Succeeded", terminated(0, result=DONE), index=1), pod("Running", RUNNING)
    met = ("SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods")
    for conditions in ((), (met,)):
        now = outcome([job(1, 2, *conditions)], [uploading, done])
        assert now.status.phase == "Running"
        assert now.text == "1 of 2 pods of train-1 still run; the others have completed"


def test_a_container_that_failed_first_is_the_cause() -> None:
    pods = (
        pod("Failed", terminated(143, result=PREEMPTED, age=10), index=0),
        pod("Failed", INITIALIZING, index=1, inits={"vault-agent": terminated(1, message="denied", age=30)}),
    )
    assert "init container vault-agent ended with exit code 1: denied" in outcome([job(1, 2, BACKOFF)], pods).text


def test_a_pod_that_somebody_deletes_is_not_called_running() -> None:
    leaving = {"deletionTimestamp": ago(-20)}
    now = outcome([job(1, 2)], [pod("Running", RUNNING, metadata=leaving), pod("Running", RUNNING, index=1)])
    assert (now.status.phase, now.decision.actions) == ("Running", ())
    assert now.text.startswith("pod train-1-0-abcde is being deleted; waiting for 2 pods to stop: ")


# -- a container that keeps a pod whose trainer has ended ------

_PROXY = {"istio-proxy": RUNNING}
_BAD_ROWS = Result(outcome="failed", reason="DatasetInvalid", message="row 7 has no text")
_KILLED = Result(outcome="failed", reason="RankKilled", message="signal 9")


def _occupied(result: Result, code: int, age: float, **fields: Any) -> Raw:
    return pod("Running", terminated(code, result=result, age=age), **{"containers": _PROXY, **fields})


def _deletes(end: Outcome) -> list[str]:
    return [action.name for action in end.decision.actions if hasattr(action, "wait")]


def test_the_container_is_named_that_keeps_a_pod_whose_trainer_has_ended() -> None:
    now = outcome([job()], [_occupied(DONE, 0, age=20)])
    assert now.status.phase == "Running"
    assert now.text == "pod train-1-0-abcde: the trainer has ended, but container istio-proxy still runs"
    assert now.decision.requeue_after == 40.0
    native = outcome([job()], [_occupied(DONE, 0, age=20, containers={}, inits=_PROXY)])  # ends with the trainer
    assert "istio-proxy" not in native.text


def test_a_job_ends_as_its_trainer_has_whatever_other_containers_do() -> None:
    done = outcome([job()], [_occupied(DONE, 0, age=61)])
    assert (done.status.phase, done.decision.actions) == ("Succeeded", ())
    failed = outcome([job()], [_occupied(_BAD_ROWS, 65, age=61)])
    assert (failed.status.phase, failed.status.reason) == ("Failed", "DatasetInvalid")
    again = outcome([job()], [_occupied(_KILLED, 72, age=61)])
    assert (again.status.phase, again.status.restarts.infrastructure) == ("Restarting", 1)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_is_kept_gives_its_gpus_back_when_the_job_has_ended(phase: Any) -> None:
    end = outcome([job()], [_occupied(DONE, 0, age=61)], phase)
    assert _deletes(end) == ["train-1"]
    leaving = job()
    leaving["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:00Z"
    assert _deletes(outcome([leaving], [_occupied(DONE, 0, age=61)], phase)) == []


def test_a_pod_that_is_kept_gives_its_gpus_back_to_the_next_attempt() -> None:
    occupied = _occupied(_KILLED, 72, age=90)
    end = outcome([job(1), job(2)], [occupied, pod("Pending", CREATING, 2)], "Restarting", 2)
    assert _deletes(end) == ["train-1"]
    orphan = outcome([job(2)], [occupied, pod("Pending", CREATING, 2)], "Restarting", 2)
    assert "waiting for pods of" not in orphan.text


def test_a_check_that_is_kept_has_passed_and_is_removed() -> None:
    check = {**job(1), "metadata": {**job(1)["metadata"], "name": "train-check", "uid": "child-0"}}
    occupied = _occupied(DONE, 0, age=61, number=0)
    gpu = {"resources": {"gpu": {}}}
    passed = outcome([check], [occupied], "Pending", 0, spec=gpu)
    assert [type(action).__name__ for action in passed.decision.actions] == ["CreateAttempt"]
    assert _deletes(outcome([check, job(1)], [occupied, pod("Running", RUNNING)], spec=gpu)) == ["train-check"]
