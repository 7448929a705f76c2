"""The life of a job against a real API server and Job controller, with the test as the kubelet."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.messages.run import parse
from finetune_api.status import ArtifactStatus, CheckpointStatus
from k8s_operator.support.kubelet_stand_in import World, job_body
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster

_DONE = Result(
    outcome="succeeded",
    step=24,
    total_steps=24,
    artifact=ArtifactStatus(uri="s3://outputs/result", manifest_digest="sha256:abc", size_bytes=123),
)
_PEER_LOST = Result(outcome="failed", reason="PeerLost", message="rank 1 went away")


def test_a_job_of_one_node_starts_runs_and_succeeds(world: World, operator: Operator) -> None:
    world.submit("one")
    (pod,) = world.run_pods("one-1")
    running = world.wait_phase("one", "Running")
    world.end_pod(pod, 0, _DONE)
    done = world.wait_phase("one", "Succeeded")

    assert running["observedGeneration"] == 1
    assert done["artifact"] == {"uri": "s3://outputs/result", "manifestDigest": "sha256:abc", "sizeBytes": 123}
    assert done["progress"]["percent"] == 100
    assert done["completionTime"] >= done["startTime"]
    assert world.condition("one", "Complete")["status"] == "True"
    assert world.condition("one", "Reconciling")["status"] == "False"
    assert world.get("services", names.service_name("one")) is None


def test_a_job_of_two_nodes_gets_a_service_and_starts_both_pods_together(world: World, operator: Operator) -> None:
    world.submit("two", distribution={"nodes": 2, "processesPerNode": 2})
    pods = world.run_pods("two-1", 2)
    world.wait_phase("two", "Running")

    run = parse(pods[0]["metadata"]["annotations"][names.ANNOTATION_RUN_CONFIG])
    assert run.world.size == 4
    assert run.world.master_address == "two-1-0.two-ranks"
    assert [pod["spec"]["hostname"] for pod in pods] == ["two-1-0", "two-1-1"]
    secrets = {pod["metadata"]["annotations"][names.ANNOTATION_RENDEZVOUS_SECRET] for pod in pods}
    assert [len(secret) for secret in secrets] == [64]
    (volume,) = [volume for volume in pods[1]["spec"]["volumes"] if volume["name"] == "run-config"]
    assert names.RENDEZVOUS_FILE in [item["path"] for item in volume["downwardAPI"]["items"]]
    service = world.get("services", "two-ranks")
    assert service is not None
    assert service["spec"]["clusterIP"] == "None"
    for pod in pods:
        world.end_pod(pod, 0, _DONE)
    world.wait_phase("two", "Succeeded")


def test_pods_are_admitted_if_pod_security_is_restricted(world: World, operators: Callable[..., Operator]) -> None:
    operators(pods={"allowedCsiDrivers": ["bucket.example.com"]}).start()
    enforce = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    world.request("PATCH", f"/api/v1/namespaces/{world.namespace}", enforce, "application/merge-patch+json")
    gpu = {"gpu": {"name": "nvidia.com/gpu"}}
    volumes = [
        {"name": "claim", "claim": {"name": "c"}},
        {"name": "image", "image": {"reference": "registry.test/m:1"}},
        {"name": "csi", "csi": {"driver": "bucket.example.com"}},
    ]
    never = {"preflight": "never"}
    world.submit("strict", distribution={"nodes": 2}, resources=gpu, run_policy=never, pod={"volumes": volumes})
    pods = world.wait_pods("strict-1", 2)
    mounted = {v["name"]: v for v in pods[0]["spec"]["volumes"]}
    assert mounted["volume-image"]["image"]["reference"] == "registry.test/m:1"
    assert pods[0]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_inputs_are_checked_before_gpus_are_allocated(world: World, operator: Operator) -> None:
    world.submit("checked", resources={"gpu": {}})
    (check,) = world.run_pods("checked-check")
    assert "nvidia.com/gpu" not in check["spec"]["containers"][0]["resources"]["limits"]
    assert world.wait_phase("checked", "Pending")["attempt"] == 0
    assert world.get("jobs", "checked-1") is None
    world.end_pod(check, 0, Result(outcome="succeeded"))
    world.run_pods("checked-1")
    assert world.wait_phase("checked", "Running")["gpus"] == 1


def test_a_failed_check_fails_the_job_and_allocates_no_gpu(world: World, operator: Operator) -> None:
    world.submit("wrong", resources={"gpu": {}})
    (check,) = world.run_pods("wrong-check")
    message = "dataset.uri: s3://data/train.jsonl isn't there; check the path"
    world.end_pod(check, 65, Result(outcome="failed", reason="DatasetNotFound", message=message))
    failed = world.wait_phase("wrong", "Failed")
    assert failed["failure"]["reason"] == "DatasetNotFound"
    assert message in failed["message"]
    assert world.condition("wrong", "Stalled")["status"] == "True"
    assert world.get("jobs", "wrong-1") is None


def test_a_users_mistake_fails_immediately_and_names_the_field(world: World, operator: Operator) -> None:
    world.submit("mistake")
    (pod,) = world.run_pods("mistake-1")
    world.end_pod(pod, 67, Result(outcome="failed", reason="OutputOccupied", message="output.uri: taken"))
    failed = world.wait_phase("mistake", "Failed")
    assert failed["failure"]["reason"] == "OutputOccupied"
    assert "output.uri" in failed["message"]
    assert failed["failure"]["hint"]
    assert failed["restartsTotal"] == 0
    assert world.condition("mistake", "Failed")["reason"] == "OutputOccupied"


def test_the_full_group_restarts_on_an_application_failure_until_its_budget_is_spent(
    world: World, operator: Operator
) -> None:
    world.submit("broken", distribution={"nodes": 2})
    for attempt in (1, 2):
        pods = world.run_pods(f"broken-{attempt}", 2)
        world.end_pod(pods[1], 1, Result(outcome="failed", reason="TrainingError", message="a bug"))
        world.leave(f"broken-{attempt}", 75, _PEER_LOST)
    failed = world.wait_phase("broken", "Failed")
    assert failed["failure"]["reason"] == "TrainingError"
    assert world.condition("broken", "Failed")["reason"] == "RestartBudgetSpent"
    assert failed["restarts"] == {"application": 1, "memory": 0, "infrastructure": 0, "preemption": 0}
    assert failed["attempt"] == 2


def test_a_lack_of_memory_has_a_budget_of_its_own_and_each_attempt_knows_it(world: World, operator: Operator) -> None:
    world.submit("oom", distribution={"nodes": 2}, run_policy={"maxRestarts": {"application": 0, "memory": 2}})
    for attempt in (1, 2, 3):
        pods = world.run_pods(f"oom-{attempt}", 2)
        run = parse(pods[0]["metadata"]["annotations"][names.ANNOTATION_RUN_CONFIG])
        assert run.memory_restarts == attempt - 1
        world.end_pod(pods[1], 137, reason="OOMKilled")
        world.leave(f"oom-{attempt}", 75, _PEER_LOST)
    failed = world.wait_phase("oom", "Failed")
    assert failed["failure"]["reason"] == "OutOfMemory"
    assert world.condition("oom", "Failed")["reason"] == "RestartBudgetSpent"
    assert failed["restarts"] == {"application": 0, "memory": 2, "infrastructure": 0, "preemption": 0}
    assert failed["attempt"] == 3


def test_no_attempt_starts_while_a_pod_of_the_last_one_lives(world: World, operator: Operator) -> None:
    world.submit("careful", distribution={"nodes": 2})
    pods = world.run_pods("careful-1", 2)
    world.end_pod(pods[0], 72, Result(outcome="failed", reason="RankKilled", message="signal 9"))
    world.wait(lambda: "deletionTimestamp" in (world.get("pods", pods[1]["metadata"]["name"]) or pods[1])["metadata"])
    world.delete("jobs", "careful-1", propagationPolicy="Orphan")  # even if somebody deletes the Job
    world.wait(lambda: world.get("jobs", "careful-1") is None)
    operator.samples("finetune_operator_leader")
    assert world.get("jobs", "careful-2") is None
    assert "careful-1-1" in world.wait_phase("careful", "Running")["message"]
    world.end_deleted_pods("careful-1")
    world.wait_job("careful-2")


def test_a_preemption_costs_no_budget(world: World, operator: Operator) -> None:
    world.submit("moved", run_policy={"maxRestarts": {"application": 0, "infrastructure": 0}})
    (pod,) = world.run_pods("moved-1")
    world.wait_phase("moved", "Running")
    world.delete("pods", pod["metadata"]["name"])
    checkpoint = CheckpointStatus(step=7, uri="s3://outputs/result/checkpoints/step-7", time="2026-01-01T00:00:00Z")
    world.end_deleted_pods("moved-1", 143, Result(outcome="preempted", reason="Preempted", checkpoint=checkpoint))
    (pod,) = world.run_pods("moved-2")
    world.wait(lambda: world.status("moved")["restarts"]["preemption"] == 1, 15, lambda: f"{world.status('moved')}")
    status = world.wait_phase("moved", "Running")
    assert status["checkpoint"]["step"] == 7
    world.end_pod(pod, 0, _DONE)
    assert world.wait_phase("moved", "Succeeded")["attempt"] == 2


def test_a_pod_that_vanishes_restarts_the_group(world: World, operator: Operator) -> None:
    world.submit("lost", distribution={"nodes": 2})
    pods = world.run_pods("lost-1", 2)
    world.wait_phase("lost", "Running")
    world.delete("pods", pods[1]["metadata"]["name"], gracePeriodSeconds=0)
    world.end_deleted_pods("lost-1", 137)
    world.leave("lost-1", 75, _PEER_LOST)
    world.run_pods("lost-2", 2)
    status = world.wait_phase("lost", "Running")
    assert status["restarts"]["infrastructure"] == 1
    assert status["failure"]["reason"] == "PodDeleted"


def test_suspend_deletes_the_pods_and_resume_is_the_next_attempt(world: World, operator: Operator) -> None:
    world.submit("pause")
    world.run_pods("pause-1")
    world.wait_phase("pause", "Running")
    world.suspend("pause")
    checkpoint = CheckpointStatus(step=5, uri="s3://outputs/result/checkpoints/step-5", time="2026-01-01T00:00:00Z")
    saved = Result(outcome="preempted", reason="Preempted", checkpoint=checkpoint)
    assert world.wait(lambda: world.end_deleted_pods("pause-1", 143, saved)) == 1
    suspended = world.wait_phase("pause", "Suspended")
    assert world.condition("pause", "Suspended")["status"] == "True"
    assert world.condition("pause", "Reconciling")["status"] == "False"
    assert suspended["checkpoint"]["step"] == 5
    assert world.get("jobs", "pause-1") is None

    world.suspend("pause", False)
    world.run_pods("pause-2")
    resumed = world.wait_phase("pause", "Running")
    assert resumed["restartsTotal"] == 0
    assert resumed["attempt"] == 2
    assert world.condition("pause", "Suspended")["status"] == "False"


def test_a_job_that_is_created_suspended_allocates_nothing(world: World, operator: Operator) -> None:
    world.submit("later", run_policy={"suspend": True})
    assert world.wait_phase("later", "Suspended")["attempt"] == 0
    assert world.all("jobs") == []
    world.suspend("later", False)
    world.wait_job("later-1")


def test_deleting_the_job_deletes_what_belongs_to_it(world: World, operator: Operator) -> None:
    world.submit("gone", distribution={"nodes": 2})
    world.run_pods("gone-1", 2)
    body = world.get("finetunejobs", "gone")
    assert body is not None
    assert body["metadata"].get("finalizers") is None
    world.delete("finetunejobs", "gone")
    world.wait(lambda: world.get("jobs", "gone-1") is None)
    world.leave("gone-1")
    world.wait(lambda: world.all("pods") == [] and world.get("services", names.service_name("gone")) is None)


def test_a_name_that_belongs_to_somebody_else_is_never_overwritten(world: World, operator: Operator) -> None:
    foreign = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "taken-ranks", "labels": {"mine": "yes"}},
        "spec": {"ports": [{"port": 80}]},
    }
    world.create("services", foreign)
    world.submit("taken", distribution={"nodes": 2})
    failed = world.wait_phase("taken", "Failed")
    assert failed["failure"]["reason"] == "NameConflict"
    assert world.condition("taken", "Stalled")["reason"] == "NameConflict"
    service = world.get("services", "taken-ranks")
    assert service is not None
    assert service["metadata"]["labels"] == {"mine": "yes"}
    assert world.all("jobs") == []


def test_a_finished_job_stays_finished_if_its_children_change(world: World, operator: Operator) -> None:
    world.submit("over")
    (pod,) = world.run_pods("over-1")
    world.end_pod(pod, 0, _DONE)
    world.wait_phase("over", "Succeeded")
    world.delete("jobs", "over-1", propagationPolicy="Background")
    world.wait(lambda: world.all("jobs") == [])
    world.request(
        "PATCH",
        world.path("finetunejobs", "over"),
        {"metadata": {"labels": {"a": "b"}}},
        "application/merge-patch+json",
    )
    operator.kill()
    operator.start()
    changed = world.patch("finetunejobs", "over", {"spec": {"runPolicy": {"activeDeadlineSeconds": 5}}})
    assert changed.accepted, changed.message
    world.wait(lambda: world.status("over")["observedGeneration"] == 2)
    assert world.status("over")["phase"] == "Succeeded"
    assert world.all("jobs") == []


def test_a_finished_jobs_pods_are_deleted_after_their_ttl_and_the_job_stays(world: World, operator: Operator) -> None:
    world.submit("brief", run_policy={"ttlSecondsAfterFinished": 1})
    (pod,) = world.run_pods("brief-1")
    world.end_pod(pod, 0, _DONE)
    world.wait_phase("brief", "Succeeded")
    world.wait(lambda: world.all("jobs") == [])
    assert world.status("brief")["phase"] == "Succeeded"


def test_a_job_fails_when_its_deadline_has_passed(world: World, operator: Operator) -> None:
    world.submit("late", run_policy={"activeDeadlineSeconds": 2})
    world.run_pods("late-1")
    world.leave("late-1")
    failed = world.wait_phase("late", "Failed")
    assert failed["failure"]["reason"] == "DeadlineExceeded"
    assert "activeDeadlineSeconds" in failed["message"]


def test_a_recreated_job_waits_until_its_predecessors_children_are_gone(world: World, operator: Operator) -> None:
    world.submit("again")
    world.run_pods("again-1")
    first = world.wait_phase("again", "Running")
    finalizer = {"metadata": {"finalizers": ["example.test/hold"]}}
    world.patch("jobs", "again-1", finalizer)
    world.delete("finetunejobs", "again")
    world.wait(lambda: world.get("finetunejobs", "again") is None)
    world.submit("again")
    world.wait_phase("again", "Pending")
    assert "deleted FineTuneJob of the same name" in world.message("again")
    assert first["attempt"] == 1
    world.patch("jobs", "again-1", {"metadata": {"finalizers": None}})
    world.leave("again-1")
    again = world.get("finetunejobs", "again")
    assert again is not None
    uid = again["metadata"]["uid"]

    def ours() -> bool:
        job = world.get("jobs", "again-1")
        return bool(job and job["metadata"]["ownerReferences"][0]["uid"] == uid)

    world.wait(ours, 30)


def test_a_recreated_job_waits_for_pods_whose_job_is_gone_already(world: World, operator: Operator) -> None:
    first = world.submit("heir")
    world.run_pods("heir-1")
    world.wait_phase("heir", "Running")
    world.delete("finetunejobs", "heir", propagationPolicy="Background")
    world.wait(lambda: world.get("jobs", "heir-1") is None, 30)  # its pod is still saving a checkpoint
    second = world.submit("heir")
    assert first["metadata"]["uid"] != second["metadata"]["uid"]
    waiting = world.wait_phase("heir", "Pending")
    assert "waiting for pods of a deleted FineTuneJob of the same name to stop: heir-1-0" in waiting["message"]
    assert world.get("jobs", "heir-1") is None
    for pod in world.all("pods", **{names.LABEL_JOB_NAME: "heir"}):
        world.end_pod(pod, 143)
    job = world.wait_job("heir-1")
    assert job["metadata"]["ownerReferences"][0]["uid"] == second["metadata"]["uid"]


def test_the_run_configuration_contains_no_secret_and_names_the_mounted_files(world: World, operator: Operator) -> None:
    body: Any = job_body("keys")
    body["spec"]["model"]["credentialsRef"] = {"name": "hf"}
    world.create("finetunejobs", body)
    (pod,) = world.wait_pods("keys-1")
    run = json.loads(pod["metadata"]["annotations"][names.ANNOTATION_RUN_CONFIG])
    assert run["model"]["location"]["credentials"] == "/etc/finetune/credentials/model"
    secrets = [volume for volume in pod["spec"]["volumes"] if "secret" in volume]
    assert [volume["secret"]["secretName"] for volume in secrets] == ["hf"]
    assert not any("serviceAccount" in volume["name"] for volume in pod["spec"]["volumes"])
