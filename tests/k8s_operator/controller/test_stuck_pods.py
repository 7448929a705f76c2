"""The status reports what pods wait for in the original message, and the job continues without help
once the cause is fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.messages.result import Result
from k8s_operator.support.kubelet_stand_in import World
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster


def test_a_missing_secret_is_reported_with_the_kubelets_message_and_recovers(world: World, operator: Operator) -> None:
    world.submit("keyless", output={"credentialsRef": {"name": "s3-writer"}})
    (pod,) = world.wait_pods("keyless-1")
    world.waiting_container(pod, "ContainerCreating", "")
    message = 'MountVolume.SetUp failed for volume "credentials-output" : secret "s3-writer" not found'
    world.warn(pod, "FailedMount", message)

    def is_reported() -> bool:
        status = world.status("keyless")
        return status.get("phase") == "Pending" and message in world.message("keyless")

    world.wait(is_reported, 20)
    assert world.condition("keyless", "Stalled")["status"] == "False"
    assert world.condition("keyless", "Reconciling")["status"] == "True"
    world.run_pod(pod)
    assert message not in world.wait_phase("keyless", "Running")["message"]


def test_a_pod_that_fits_no_node_is_reported_with_the_schedulers_message(world: World, operator: Operator) -> None:
    world.submit("huge", resources={"cpu": "1000"})
    world.wait_pods("huge-1")
    world.wait_phase("huge", "Pending")
    message = world.message("huge")
    assert "nodes are available" in message
    assert "huge-1-0" in message


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("ImagePullBackOff", 'Back-off pulling image "example.test/trainer:1"'),
        ("CreateContainerConfigError", 'configmap "x" not found'),
    ],
)
def test_a_container_that_cannot_start_is_reported_with_the_kubelets_message(
    world: World, operator: Operator, reason: str, message: str
) -> None:
    world.submit("image")
    (pod,) = world.wait_pods("image-1")
    world.waiting_container(pod, reason, message)
    world.wait(lambda: f"{reason}: {message}" in world.message("image"))
    assert world.condition("image", "Reconciling")["reason"] == reason


def test_a_quota_that_refuses_the_job_is_reported_with_its_message_and_recovers(
    world: World, operator: Operator
) -> None:
    quota: Any = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none"},
        "spec": {"hard": {"count/jobs.batch": "0"}},
    }
    world.create("resourcequotas", quota)
    world.wait(lambda: (world.get("resourcequotas", "none") or {}).get("status", {}).get("hard"))
    world.submit("limited")
    status = world.wait_phase("limited", "Pending")
    assert "exceeded quota: none" in world.message("limited")
    assert status["attempt"] == 0
    world.delete("resourcequotas", "none")
    world.wait_job("limited-1", 20)
    assert world.status("limited")["restartsTotal"] == 0


def test_pods_that_a_quota_refuses_are_reported_with_the_job_controllers_message(
    world: World, operator: Operator
) -> None:
    quota: Any = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small"},
        "spec": {"hard": {"pods": "0"}},
    }
    world.create("resourcequotas", quota)
    world.wait(lambda: (world.get("resourcequotas", "small") or {}).get("status", {}).get("hard"))
    world.submit("podless")
    world.wait_job("podless-1")
    world.wait(lambda: "exceeded quota: small" in world.message("podless"), 20)


def test_a_service_that_is_deleted_while_pods_start_is_made_again(world: World, operator: Operator) -> None:
    world.submit("nameless", distribution={"nodes": 2})
    world.run_pods("nameless-1", 2)
    world.wait(lambda: world.get("services", "nameless-ranks"))
    world.delete("services", "nameless-ranks")
    world.wait(lambda: world.get("services", "nameless-ranks"), 30, lambda: "new Service")


def test_pods_follow_an_image_that_is_mended_in_the_chart_while_none_has_started(
    world: World, operators: Callable[..., Operator]
) -> None:
    first = operators(trainerImage="example.test/trainer:typo")
    first.start()
    world.submit("mended")
    (pod,) = world.wait_pods("mended-1")
    world.waiting_container(pod, "ImagePullBackOff", "not found")
    world.wait(lambda: "ImagePullBackOff" in world.status("mended").get("message", ""))
    first.kill()
    operators(trainerImage="example.test/trainer:2", pod_name="second").start()
    world.wait(lambda: world.end_deleted_pods("mended-1") == 1, 20)
    (pod,) = world.wait_pods("mended-2", 1, 20)
    assert pod["spec"]["containers"][0]["image"] == "example.test/trainer:2"
    world.run_pod(pod)
    assert world.wait_phase("mended", "Running", 20)["restartsTotal"] == 0


def test_a_failed_job_is_tried_again_after_what_its_hint_names_was_changed(world: World, operator: Operator) -> None:
    world.submit("again", resources={"scratch": "1Gi"})
    (pod,) = world.run_pods("again-1")
    world.end_pod(pod, 76, Result(outcome="failed", reason="DiskFull", message="no space"))
    world.wait_phase("again", "Failed", 20)
    assert "auto would be" in world.message("again")
    change = {"resources": {"scratch": "50Gi"}, "runPolicy": {"retry": 1}}
    answer = world.patch("finetunejobs", "again", {"spec": change})
    assert answer.accepted, answer.message
    (pod,) = world.run_pods("again-2")
    assert pod["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] == "50Gi"
    status = world.wait_phase("again", "Running", 20)
    assert (status["retry"], status["restartsTotal"], status["failure"]["reason"]) == (1, 0, "DiskFull")
    assert "completionTime" not in status
    assert world.condition("again", "Failed")["status"] == "False"
