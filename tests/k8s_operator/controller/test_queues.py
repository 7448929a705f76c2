"""A queue, such as Kueue's, suspends the Jobs of attempts and admits them later; the status says
so, and the operator never sets spec.suspend back."""

from __future__ import annotations

import pytest

from finetune_api.messages.result import Result
from finetune_api.status import ArtifactStatus
from k8s_operator.support.kubelet_stand_in import World
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster

_DONE = Result(
    outcome="succeeded",
    artifact=ArtifactStatus(uri="s3://outputs/result", manifest_digest="sha256:abc", size_bytes=1),
)


def _queue(world: World, job: str, suspended: bool) -> None:
    answer = world.patch("jobs", job, {"spec": {"suspend": suspended}})
    assert answer.accepted, answer.message


def _wait_until_removed(world: World, job: str) -> None:
    """Wait until the pods are gone; as they have no node yet, nobody has to stop them."""
    labels = {"batch.kubernetes.io/job-name": job}
    world.wait(lambda: not world.all("pods", **labels), 20, lambda: f"removal of the pods of {job}")


def test_a_job_that_waits_in_a_queue_is_queued_until_it_is_admitted(world: World, operator: Operator) -> None:
    world.submit("patient", distribution={"nodes": 2})
    world.wait_job("patient-1")
    _queue(world, "patient-1", True)
    _wait_until_removed(world, "patient-1")
    status = world.wait_phase("patient", "Queued", 20)
    assert status["message"] == "Job patient-1 is suspended until a queue, such as Kueue's, admits it"
    assert world.condition("patient", "Reconciling")["status"] == "True"
    assert world.condition("patient", "Suspended")["status"] == "False"
    _queue(world, "patient-1", False)
    pods = world.run_pods("patient-1", 2)
    world.wait_phase("patient", "Running", 20)
    for pod in pods:
        world.end_pod(pod, 0, _DONE)
    assert world.wait_phase("patient", "Succeeded", 20)["attempt"] == 1


def test_a_job_that_a_queue_takes_its_nodes_from_continues_when_it_is_admitted_again(
    world: World, operator: Operator
) -> None:
    world.submit("displaced", distribution={"nodes": 2})
    world.run_pods("displaced-1", 2)
    world.wait_phase("displaced", "Running", 20)
    _queue(world, "displaced-1", True)
    world.leave("displaced-1", 75, Result(outcome="preempted", message="SIGTERM"))
    world.wait_phase("displaced", "Queued", 20)
    _queue(world, "displaced-1", False)
    pods = world.run_pods("displaced-1", 2)
    world.wait_phase("displaced", "Running", 20)
    for pod in pods:
        world.end_pod(pod, 0, _DONE)
    status = world.wait_phase("displaced", "Succeeded", 20)
    assert status["attempt"] == 1
    assert status["restarts"] == {"application": 0, "memory": 0, "infrastructure": 0, "preemption": 0}


def test_a_queued_job_can_be_suspended_and_resumed(world: World, operator: Operator) -> None:
    world.submit("held")
    world.wait_job("held-1")
    _queue(world, "held-1", True)
    _wait_until_removed(world, "held-1")
    world.wait_phase("held", "Queued", 20)
    world.suspend("held")
    world.wait_phase("held", "Suspended", 20)
    assert world.get("jobs", "held-1") is None
