"""The verdict on an attempt: a table from its pods to the reason that follows from them."""

from __future__ import annotations

import pytest

from finetune_api.messages.result import Result
from finetune_api.status import ArtifactStatus
from finetune_operator.core import parsing
from finetune_operator.core.objects import Pod, Termination
from finetune_operator.core.verdict import needs_service, needs_warning_events, verdict
from k8s_operator.support.observed_states import a_dead_pod, a_done_pod, a_pod, an_attempt, an_observation, failed

_PREEMPTED = Result(outcome="preempted", reason="Preempted")

_REFUSED_DRIVER = a_pod(
    0,
    "Failed",
    termination=Termination(
        128,
        "StartError",
        "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: "
        "unable to start container process: error during container init: error running prestart hook #0: exit status "
        "1, stdout: , stderr: Auto-detected mode as 'legacy'\nnvidia-container-cli: requirement error: unsatisfied "
        "condition: cuda>=13.0, please update your driver to a newer version, or use an earlier cuda container",
    ),
)

DEATHS: dict[str, tuple[tuple[Pod, ...], str]] = {
    "the supervisor's own reason": ((a_dead_pod(0, 71, failed("NonFiniteLoss")),), "NonFiniteLoss"),
    "killed for memory before it could report": ((a_dead_pod(0, 137, reason="OOMKilled"),), "OutOfMemory"),
    "the cause goes before its consequence, although it was reported later": (
        (a_dead_pod(0, 75, failed("PeerLost"), at="2026-01-02T03:00:00Z"),
         a_dead_pod(1, 70, failed("OutOfMemory"), at="2026-01-02T03:00:09Z")),
        "OutOfMemory",
    ),
    "a user's mistake goes before everything": (
        (a_dead_pod(0, 137, reason="OOMKilled"), a_dead_pod(1, 65, failed("DatasetInvalid"))), "DatasetInvalid",
    ),
    "a lost node goes before the stall that it causes": (
        (a_dead_pod(0, 73, failed("Stalled")), a_dead_pod(1, 137, disruption="DeletionByPodGC")), "NodeLost",
    ),
    "an evicted pod that saved its checkpoint": (
        (a_dead_pod(0, 143, _PREEMPTED, disruption="EvictionByEvictionAPI"),), "Evicted",
    ),
    "preempted by a more important pod": ((a_dead_pod(0, 137, disruption="PreemptionByScheduler"),), "Evicted"),
    "its scratch disk was full": (
        (a_dead_pod(0, 137, status_reason="Evicted", status_message='Usage of EmptyDir volume "scratch" exceeds'),),
        "DiskFull",
    ),
    "its container wrote more than it may": (
        (a_dead_pod(0, 137, status_reason="Evicted",
                    status_message="Pod ephemeral local storage usage exceeds the total limit of containers 23Gi."),),
        "DiskFull",
    ),
    "another pod filled the node's disk": (
        (a_dead_pod(0, 137, disruption="TerminationByKubelet", status_reason="Evicted",
                    status_message="The node was low on resource: ephemeral-storage."),),
        "Evicted",
    ),
    "terminated": ((a_dead_pod(0, 143, _PREEMPTED), a_dead_pod(1, 143, _PREEMPTED)), "Preempted"),
    "the first one, if both are consequences": (
        (a_dead_pod(0, 143, _PREEMPTED, at="2026-01-02T03:00:09Z"),
         a_dead_pod(1, 75, failed("PeerLost"), at="2026-01-02T03:00:00Z")),
        "PeerLost",
    ),
    "deleted without a result": ((a_pod(0, gone=True),), "PodDeleted"),
    "an exit code of only one reason": ((a_dead_pod(0, 76),), "DiskFull"),
    "an exit code that several share": ((a_dead_pod(0, 65),), "PodFailed"),
    "an exit code that nobody knows": ((a_dead_pod(0, 99),), "PodFailed"),
    "a check that the kubelet ended at its deadline": (
        (a_dead_pod(0, 143, status_reason="DeadlineExceeded",
                    status_message="Pod was active on the node longer than the specified deadline"),),
        "PreflightTimeout",
    ),
    "a kubelet that refused the pod": (
        (a_pod(0, "Failed", status_reason="UnexpectedAdmissionError", status_message="no device"),), "PodRefused",
    ),
    "a kubelet whose node is full": (
        (a_pod(0, "Failed", status_reason="OutOfcpu", status_message="Node didn't have enough resource: cpu"),),
        "PodRefused",
    ),
    "a scratch disk that is too small, although the pod says that it was only asked to stop": (
        (a_dead_pod(0, 143, _PREEMPTED, status_reason="Evicted",
                    status_message='Usage of EmptyDir volume "scratch" exceeds the limit "1Gi".'),),
        "DiskFull",
    ),
    "an eviction, although the pod says that it lost its peers": (
        (a_dead_pod(0, 75, failed("PeerLost"), disruption="EvictionByEvictionAPI"),), "Evicted",
    ),
    "the kubelet's eviction without a condition": (
        (a_dead_pod(0, 143, _PREEMPTED, status_reason="Evicted",
                    status_message="The node was low on resource: memory."),),
        "Evicted",
    ),
    "the shutdown of a node": (
        (a_dead_pod(0, 143, _PREEMPTED, status_reason="Terminated",
                    status_message="Pod was terminated in response to imminent node shutdown."),),
        "Evicted",
    ),
    "a mistake of the user, although the pod was evicted then": (
        (a_dead_pod(0, 65, failed("DatasetInvalid"), disruption="EvictionByEvictionAPI"),), "DatasetInvalid",
    ),
    "a failed GPU goes before the errors of NCCL that it causes": (
        (a_dead_pod(0, 1, failed("TrainingError"), at="2026-01-02T03:00:00Z"),
         a_dead_pod(1, 80, failed("GpuFault"), at="2026-01-02T03:00:09Z")),
        "GpuFault",
    ),
    "an exit code of a GPU without a result": ((a_dead_pod(0, 79),), "GpuUnavailable"),
    "a driver that NVIDIA's runtime refuses": ((_REFUSED_DRIVER,), "GpuUnavailable"),
    "a container that can't start for another cause": (
        (a_pod(0, "Failed", termination=Termination(128, "StartError", "exec: python: not found")),), "PodFailed",
    ),
    "a GPU that became unhealthy before the pod started": (
        (a_pod(0, "Failed", status_reason="UnexpectedAdmissionError",
               status_message="Allocate failed due to no healthy devices present; cannot allocate unhealthy devices "
                              "nvidia.com/gpu, which is unexpected"),),
        "GpuUnavailable",
    ),
    "no pod is left": ((), "PodDeleted"),
}  # fmt: skip


@pytest.mark.parametrize(("pods", "reason"), DEATHS.values(), ids=DEATHS.keys())
def test_the_reason_of_a_failed_attempt_is_that_of_its_most_specific_pod(pods: tuple[Pod, ...], reason: str) -> None:
    outcome = verdict(an_attempt(1, *pods, failed=True))
    assert (outcome.state, outcome.reason) == ("failed", reason)


def test_a_refused_driver_is_reported_in_the_runtimes_own_words() -> None:
    message = verdict(an_attempt(1, _REFUSED_DRIVER, failed=True)).message
    assert "unsatisfied condition: cuda>=13.0, please update your driver" in message


def test_an_attempt_that_failed_is_ending_while_a_pod_of_it_lives() -> None:
    outcome = verdict(an_attempt(1, a_dead_pod(0, 70, failed("OutOfMemory")), a_pod(1), failed=True))
    assert outcome.state == "ending"
    assert "train-1-1" in outcome.message


def test_a_dead_pod_ends_the_attempt_before_the_job_controller_reports_it() -> None:
    assert verdict(an_attempt(1, a_dead_pod(0, 1), a_pod(1))).state == "ending"


def test_the_first_pods_result_is_that_of_the_group() -> None:
    artifact = ArtifactStatus(uri="s3://o", manifest_digest="sha256:1", size_bytes=1)
    first, second = Result(outcome="succeeded", artifact=artifact), Result(outcome="succeeded")
    outcome = verdict(an_attempt(1, a_done_pod(0, first), a_done_pod(1, second), complete=True))
    assert (outcome.state, outcome.result) == ("succeeded", first)


def test_an_attempt_runs_when_all_pods_run() -> None:
    assert verdict(an_attempt(1, a_pod(0), a_pod(1))).state == "running"
    assert verdict(an_attempt(1, a_pod(0), a_pod(1, "Pending"))).state == "waiting"
    assert verdict(an_attempt(1, a_pod(0), expected_pods=2)).state == "waiting"


def test_an_attempt_still_runs_when_one_of_two_pods_has_completed() -> None:
    assert verdict(an_attempt(1, a_pod(0), a_done_pod(1))).state == "running"


@pytest.mark.parametrize(
    ("pod", "warnings", "reason", "message"),
    [
        (a_pod(0, "Pending", unschedulable="0/3 nodes are available"), {}, "Unschedulable", "0/3 nodes are available"),
        (a_pod(0, "Pending", waiting_reason="ErrImagePull", waiting_message="not found"), {},
         "ImagePullBackOff", "ImagePullBackOff: not found"),
        (a_pod(0, "Pending", waiting_reason="ContainerCreating"), {"pod-0": "FailedMount: secret not found"},
         "FailedMount", "FailedMount: secret not found"),
        (a_pod(0, "Pending", waiting_reason="ContainerCreating"), {}, "PodsStarting", "0 of 1 pod running"),
    ],
    ids=["scheduler", "image", "events", "no message"],
)  # fmt: skip
def test_what_a_pod_waits_for_is_reported_with_the_original_message(
    pod: Pod, warnings: dict[str, str], reason: str, message: str
) -> None:
    outcome = verdict(an_attempt(1, pod), warnings)
    assert (outcome.state, outcome.reason) == ("waiting", reason)
    assert message in outcome.message


def test_events_are_read_only_if_nothing_else_explains_the_wait() -> None:
    quiet = a_pod(0, "Pending", waiting_reason="ContainerCreating")
    assert needs_warning_events(an_attempt(1, quiet)) == ("pod-0",)
    assert needs_warning_events(an_attempt(1, a_pod(0, "Pending", unschedulable="no room"))) == ()
    assert needs_warning_events(an_attempt(1, expected_pods=1)) == ("child-1",)
    assert needs_warning_events(an_attempt(1, a_pod(0))) == ()


def test_a_pod_whose_container_has_ended_but_whose_phase_lags_counts_as_started() -> None:
    raw = {
        "metadata": {"namespace": "team", "name": "train-1-0", "uid": "pod-0", "resourceVersion": "1"},
        "status": {
            "phase": "Running",
            "containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 0}}}],
        },
    }
    assert parsing.pod(raw).started


def test_an_attempt_has_succeeded_when_every_index_has_before_the_job_controller_reports_it() -> None:
    result = Result(outcome="succeeded", step=4)
    outcome = verdict(an_attempt(1, a_done_pod(0, result), a_done_pod(1)))
    assert (outcome.state, outcome.result) == ("succeeded", result)
    assert verdict(an_attempt(1, a_done_pod(0), a_done_pod(0), a_pod(1))).state == "running"


def test_pods_from_before_a_suspension_do_not_end_the_attempt_after_it() -> None:
    before = a_dead_pod(0, 75, _PREEMPTED, gone=True)
    assert verdict(an_attempt(1, before)).state == "waiting"
    assert verdict(an_attempt(1, before, a_pod(0, uid="pod-new"), expected_pods=1)).state == "running"
    outcome = verdict(an_attempt(1, before, a_dead_pod(0, 76, uid="pod-new"), expected_pods=1, failed=True))
    assert (outcome.state, outcome.reason) == ("failed", "DiskFull")


@pytest.mark.parametrize(
    ("pods", "fields", "state"),
    [
        ((), {}, "queued"),
        ((a_pod(0, gone=True),), {}, "queued"),
        ((a_dead_pod(0, 75, gone=True),), {}, "queued"),
        ((a_pod(0, deleting=True),), {}, "ending"),
        ((a_dead_pod(0, 75),), {"failing": True}, "ending"),
        ((a_dead_pod(0, 75, _PREEMPTED),), {"failed": True}, "failed"),
        ((), {"deleting": True}, "ending"),
        ((a_done_pod(0),), {}, "succeeded"),
    ],
)
def test_a_job_that_a_queue_has_suspended_is_queued_once_its_pods_have_stopped(
    pods: tuple[Pod, ...], fields: dict[str, bool], state: str
) -> None:
    assert verdict(an_attempt(1, *pods, suspended=True, **fields)).state == state


@pytest.mark.parametrize(
    ("phases", "needed"),
    [(("Pending", "Pending"), False), (("Running", "Pending"), True), (("Running",), False)],
    ids=["nobody looks for it yet", "a pod looks for the other", "a pod alone"],
)
def test_a_service_is_needed_while_pods_look_for_each_other(phases: tuple[str, ...], needed: bool) -> None:
    pods = tuple(a_pod(index, phase) for index, phase in enumerate(phases))
    assert needs_service(an_observation(None, an_attempt(1, *pods))) == needed
