"""The operator dies, the API server dies, or replicas take over: a job ends as if nothing had
happened, and there is never a second group of pods."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from conftest import localcluster
from finetune_api.messages.result import Result
from finetune_api.status import ArtifactStatus
from k8s_operator.support.kubelet_stand_in import World, audit_writes
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster

Operators = Callable[..., Operator]

_DONE = Result(
    outcome="succeeded",
    artifact=ArtifactStatus(uri="s3://outputs/result", manifest_digest="sha256:abc", size_bytes=1),
)


def _settled(world: World, name: str) -> None:
    """Wait until the status of this job hasn't been written for two seconds."""
    last, since = None, time.monotonic()
    while time.monotonic() - since < 2:
        version = (world.get("finetunejobs", name) or {})["metadata"]["resourceVersion"]
        if version != last:
            last, since = version, time.monotonic()
        time.sleep(0.1)


def test_a_jobs_life_costs_at_most_seven_writes_and_an_idle_operator_writes_nothing(
    world: World, crd: Any, operators: Operators
) -> None:
    operator = operators()
    operator.start()
    world.submit("cheap", distribution={"nodes": 2}, resources={"gpu": {}})
    (check,) = world.run_pods("cheap-check")
    world.end_pod(check, 0, Result(outcome="succeeded"))
    pods = world.run_pods("cheap-1", 2)
    world.wait_phase("cheap", "Running")
    for pod in pods:
        world.end_pod(pod, 0, _DONE)
    world.wait_phase("cheap", "Succeeded")

    def events() -> int:
        return audit_writes(crd.audit_log, world.namespace).count("create events")

    world.wait(lambda: events() == 2, 10, lambda: f"Started and Succeeded: {events()} Events")
    writes = audit_writes(crd.audit_log, world.namespace)
    assert writes.count("create jobs") == 2
    assert writes.count("create services") == 1
    assert writes.count("create networkpolicies") == 1
    assert len([write for write in writes if not write.endswith("events")]) <= 7, writes

    world.submit("idle")
    world.run_pods("idle-1")
    world.wait_phase("idle", "Running")
    _settled(world, "idle")
    before = audit_writes(crd.audit_log, world.namespace)
    operator.kill()
    operator.start()
    time.sleep(4)
    assert audit_writes(crd.audit_log, world.namespace) == before


@pytest.mark.parametrize("moment", ["submitted", "created", "running", "failed", "restarting", "suspending", "ended"])
def test_an_operator_killed_at_any_moment_finishes_the_job_with_one_group_at_a_time(
    world: World, operators: Operators, moment: str
) -> None:
    operator = operators()
    operator.start()

    def here(name: str) -> None:
        if name == moment:
            operator.kill()
            operator.start(wait=name == "submitted")

    world.submit("steady", distribution={"nodes": 2})
    here("submitted")
    world.wait_job("steady-1", 20)
    here("created")
    pods = world.run_pods("steady-1", 2)
    here("running")
    world.end_pod(pods[1], 72, Result(outcome="failed", reason="RankKilled", message="signal 9"))
    here("failed")
    world.leave("steady-1", 75, Result(outcome="failed", reason="PeerLost"))
    here("restarting")
    world.wait_job("steady-2", 20)
    world.run_pods("steady-2", 2)
    world.wait_phase("steady", "Running", 20)
    world.suspend("steady")
    here("suspending")
    world.leave("steady-2")
    world.wait_phase("steady", "Suspended", 20)
    world.suspend("steady", False)
    world.wait_job("steady-3", 20)
    for pod in world.run_pods("steady-3", 2):
        world.end_pod(pod, 0, _DONE)
    here("ended")
    done = world.wait_phase("steady", "Succeeded", 20)
    assert done["restarts"] == {"application": 0, "memory": 0, "infrastructure": 1, "preemption": 0}
    assert done["attempt"] == 3
    assert {job["metadata"]["name"] for job in world.all("jobs")} <= {"steady-1", "steady-3"}


def test_an_operator_killed_between_a_job_and_its_status_creates_no_second_job(
    world: World, crd: Any, operators: Operators
) -> None:
    """The operator is killed as soon as possible after each creation, many times: names and owners
    prevent a second Job."""
    operator = operators()
    operator.start()
    for number in range(6):
        world.submit(f"fast-{number}")
        world.wait_job(f"fast-{number}-1", 20)
        operator.kill()
        operator.start()
    for number in range(6):
        world.wait(lambda n=number: world.status(f"fast-{n}").get("attempt") == 1, 20)  # type: ignore[misc]
    assert len(world.all("jobs")) == 6


def test_jobs_continue_after_a_restart_of_the_api_server(
    world: World, control_plane: Any, operators: Operators
) -> None:
    operator = operators()
    operator.start()
    world.submit("hardy")
    (pod,) = world.run_pods("hardy-1")
    world.wait_phase("hardy", "Running")
    localcluster("restart", "--name", control_plane.name, "kube-apiserver", "--kill")
    world.wait(lambda: world.status("hardy"), 60)
    world.end_pod(pod, 0, _DONE)
    if not operator.is_running:  # crash-only: after any unexpected error, a restart has to converge
        operator.start()
    world.wait_phase("hardy", "Succeeded", 60)
    world.submit("after")
    world.wait_job("after-1", 30)


def test_the_second_replica_takes_over_when_the_leader_is_killed(world: World, operators: Operators) -> None:
    first = operators(pod_name="first", leader_election={"enabled": True})
    second = operators(pod_name="second", leader_election={"enabled": True})
    first.start()
    second.start()
    assert first.samples("finetune_operator_leader") == [1.0]
    assert second.samples("finetune_operator_leader") == [0.0]
    world.submit("before")
    world.wait_job("before-1")
    first.kill()
    world.submit("after")
    world.wait_job("after-1", 20)
    assert second.samples("finetune_operator_leader") == [1.0]
    assert len(world.all("jobs")) == 2


def test_a_leader_that_is_terminated_hands_over_immediately(world: World, operators: Operators) -> None:
    first = operators(pod_name="first", leader_election={"enabled": True, "leaseSeconds": 60, "renewSeconds": 40})
    second = operators(pod_name="second", leader_election={"enabled": True, "leaseSeconds": 60, "renewSeconds": 40})
    first.start()
    second.start()
    first.stop()
    assert first.exit_code == 0
    world.submit("handed")
    world.wait_job("handed-1", 10)


def test_a_leader_whose_lease_was_taken_ends_itself(world: World, operators: Operators) -> None:
    operator = operators(leader_election={"enabled": True})
    operator.start()
    lease = world.get("leases", "finetune-operator")
    assert lease is not None
    later = {"holderIdentity": "thief/10.0.0.9", "renewTime": "2999-01-01T00:00:00.000000Z"}
    world.patch("leases", "finetune-operator", {"spec": later})
    world.wait(lambda: not operator.is_running, 10)
    assert operator.exit_code != 0
