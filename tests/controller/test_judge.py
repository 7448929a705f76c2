"""What happened to an attempt: one table of pods and the word that follows from them."""

from __future__ import annotations

import pytest

from controller.builders import a_dead_pod, a_done_pod, a_pod, an_attempt, failed
from finetune_api.result import Result
from finetune_api.status import ArtifactStatus
from finetune_operator import observe
from finetune_operator.judge import needs_words, verdict
from finetune_operator.observe import Pod

_PREEMPTED = Result(outcome="preempted", reason="Preempted")

DEATHS: dict[str, tuple[tuple[Pod, ...], str]] = {
    "the supervisor's word": ((a_dead_pod(0, 71, failed("NonFiniteLoss")),), "NonFiniteLoss"),
    "killed for memory before it could say a word": ((a_dead_pod(0, 137, reason="OOMKilled"),), "OutOfMemory"),
    "the cause goes before its consequence, though it was told later": (
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
    "asked to leave": ((a_dead_pod(0, 143, _PREEMPTED), a_dead_pod(1, 143, _PREEMPTED)), "Preempted"),
    "who was first, where both are consequences": (
        (a_dead_pod(0, 143, _PREEMPTED, at="2026-01-02T03:00:09Z"),
         a_dead_pod(1, 75, failed("PeerLost"), at="2026-01-02T03:00:00Z")),
        "PeerLost",
    ),
    "deleted without a word": ((a_pod(0, gone=True),), "PodDeleted"),
    "an exit code that is one reason's alone": ((a_dead_pod(0, 76),), "DiskFull"),
    "an exit code that several share": ((a_dead_pod(0, 65),), "PodFailed"),
    "an exit code that nobody knows": ((a_dead_pod(0, 99),), "PodFailed"),
    "a kubelet that refused the pod": (
        (a_pod(0, "Failed", status_reason="UnexpectedAdmissionError", status_message="no GPU"),), "PodFailed",
    ),
    "no pod is left": ((), "PodDeleted"),
}  # fmt: skip


@pytest.mark.parametrize(("pods", "reason"), DEATHS.values(), ids=DEATHS.keys())
def test_the_reason_of_a_failed_attempt_is_its_most_telling_pods(pods: tuple[Pod, ...], reason: str) -> None:
    found = verdict(an_attempt(1, *pods, failed=True))
    assert (found.state, found.reason) == ("failed", reason)


def test_an_attempt_that_failed_is_ending_while_a_pod_of_it_lives() -> None:
    found = verdict(an_attempt(1, a_dead_pod(0, 70, failed("OutOfMemory")), a_pod(1), failed=True))
    assert found.state == "ending"
    assert "train-1-1" in found.message


def test_a_dead_pod_ends_the_attempt_before_the_job_controller_has_said_so() -> None:
    assert verdict(an_attempt(1, a_dead_pod(0, 1), a_pod(1))).state == "ending"


def test_the_first_pods_result_is_the_groups() -> None:
    artifact = ArtifactStatus(uri="s3://o", manifest_digest="sha256:1", size_bytes=1)
    first, second = Result(outcome="succeeded", artifact=artifact), Result(outcome="succeeded")
    found = verdict(an_attempt(1, a_done_pod(0, first), a_done_pod(1, second), complete=True))
    assert (found.state, found.result) == ("succeeded", first)


def test_it_runs_when_all_pods_run() -> None:
    assert verdict(an_attempt(1, a_pod(0), a_pod(1))).state == "running"
    assert verdict(an_attempt(1, a_pod(0), a_pod(1, "Pending"))).state == "waiting"
    assert verdict(an_attempt(1, a_pod(0), pods_wanted=2)).state == "waiting"


def test_it_still_runs_when_one_of_two_has_completed() -> None:
    assert verdict(an_attempt(1, a_pod(0), a_done_pod(1))).state == "running"


@pytest.mark.parametrize(
    ("pod", "words", "reason", "message"),
    [
        (a_pod(0, "Pending", unschedulable="0/3 nodes are available"), {}, "Unschedulable", "0/3 nodes are available"),
        (a_pod(0, "Pending", waiting_reason="ErrImagePull", waiting_message="not found"), {},
         "ImagePullBackOff", "ImagePullBackOff: not found"),
        (a_pod(0, "Pending", waiting_reason="ContainerCreating"), {"pod-0": "FailedMount: secret not found"},
         "FailedMount", "FailedMount: secret not found"),
        (a_pod(0, "Pending", waiting_reason="ContainerCreating"), {}, "PodsStarting", "0 of 1 pod run"),
    ],
    ids=["scheduler", "image", "events", "nothing said"],
)  # fmt: skip
def test_what_a_pod_waits_for_is_told_in_others_words(
    pod: Pod, words: dict[str, str], reason: str, message: str
) -> None:
    found = verdict(an_attempt(1, pod), words)
    assert (found.state, found.reason) == ("waiting", reason)
    assert message in found.message


def test_events_are_asked_for_only_where_nothing_else_speaks() -> None:
    quiet = a_pod(0, "Pending", waiting_reason="ContainerCreating")
    assert needs_words(an_attempt(1, quiet)) == ("pod-0",)
    assert needs_words(an_attempt(1, a_pod(0, "Pending", unschedulable="no room"))) == ()
    assert needs_words(an_attempt(1, pods_wanted=1)) == ("child-1",)
    assert needs_words(an_attempt(1, a_pod(0))) == ()


def test_a_pod_whose_container_has_ended_but_whose_phase_lags_is_still_one_that_ran() -> None:
    raw = {
        "metadata": {"namespace": "team", "name": "train-1-0", "uid": "pod-0", "resourceVersion": "1"},
        "status": {
            "phase": "Running",
            "containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 0}}}],
        },
    }
    assert observe.pod(raw).started


def test_it_has_succeeded_when_every_index_has_before_the_job_controller_says_so() -> None:
    result = Result(outcome="succeeded", step=4)
    found = verdict(an_attempt(1, a_done_pod(0, result), a_done_pod(1)))
    assert (found.state, found.result) == ("succeeded", result)
    assert verdict(an_attempt(1, a_done_pod(0), a_done_pod(0), a_pod(1))).state == "running"
