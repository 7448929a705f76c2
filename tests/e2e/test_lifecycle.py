"""Suspend and resume, failure and restart, delete, and a killed operator or API server."""

from __future__ import annotations

import json
import time

import pytest

from demo import install
from e2e.support.jobs import World, fine_tune_job
from finetune_api.names import HISTORY_PATH

TWO_PODS = {
    "distribution": {"nodes": 2, "processesPerNode": 1, "strategy": "ddp"},
    "resources": {"cpu": "600m", "memory": "3Gi", "scratch": "2Gi", "sharedMemory": "128Mi"},
}


def _long(name: str, steps: int = 400, every: int = 10) -> dict[str, object]:
    return fine_tune_job(
        name,
        training={"maxSteps": steps, "globalBatchSize": 8, "learningRate": 1e-3, "evalEverySteps": 0},
        checkpoint={"every": every},
        **TWO_PODS,
    )


def _reported_steps(world: World, name: str) -> list[int]:
    lines = world.download(name, HISTORY_PATH).decode().splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["type"] == "step"]


def test_a_suspended_job_saves_a_checkpoint_stops_and_resumes_from_it(world: World) -> None:
    name = world.apply(_long("suspended"))
    world.until_step(name, 15)
    world.suspend(name, True)
    status = world.until_phase(name, "Suspended", seconds=90)
    assert world.live_pods(name) == []
    saved = status["checkpoint"]["step"]
    assert saved >= 15
    world.suspend(name, False)
    status = world.until_phase(name, "Succeeded", seconds=300)
    assert status["attempt"] == 2
    assert status["restarts"] == {"application": 0, "memory": 0, "infrastructure": 0, "preemption": 0}
    assert _reported_steps(world, name) == list(range(1, 401)), "a step is missing or was reported twice"


def test_a_killed_rank_restarts_the_full_group_from_the_checkpoint(world: World) -> None:
    name = world.apply(_long("killed"))
    world.until_step(name, 25)
    pod = world.live_pods(name)[1]
    world.kubectl("exec", pod, "--", "python3", "-c", KILL_A_RANK)
    status = world.until(name, lambda s: s.get("attempt") == 2, 120, "at attempt 2")
    assert status["restarts"]["infrastructure"] == 1
    status = world.until_phase(name, "Succeeded", seconds=300)
    assert _reported_steps(world, name) == list(range(1, 401))


KILL_A_RANK = """
import os, signal
for pid in filter(str.isdigit, os.listdir('/proc')):
    if b'\\0finetune_trainer.rank\\0' in open(f'/proc/{pid}/cmdline', 'rb').read():
        os.kill(int(pid), signal.SIGKILL)
"""


def test_a_deleted_pod_restarts_the_group(world: World) -> None:
    name = world.apply(_long("pod-deleted"))
    world.until_step(name, 15)
    world.kubectl("delete", "pod", world.live_pods(name)[1], "--wait=false")
    world.until(name, lambda s: s.get("attempt") == 2, 120, "at attempt 2")
    world.until_phase(name, "Succeeded", seconds=300)


def test_a_deleted_job_leaves_nothing_in_the_cluster(world: World) -> None:
    name = world.apply(_long("removed"))
    world.until_step(name, 2)
    world.delete(name)
    end = time.monotonic() + 90
    while world.pods(name) or name in world.kubectl("get", "ftj,jobs,services", "-o", "name"):
        assert time.monotonic() < end, world.kubectl("get", "ftj,jobs,services,pods")
        time.sleep(1)


@pytest.mark.parametrize("moment", ["before-pods", "training"])
def test_the_operator_killed_at_any_moment_changes_nothing(world: World, moment: str) -> None:
    name = world.apply(_long(f"operator-killed-{moment}", steps=150))
    if moment == "training":
        world.until_step(name, 15)
    _kill_operators(world)
    status = world.until_phase(name, "Succeeded", seconds=300)
    assert status["attempt"] == 1
    jobs = world.kubectl("get", "jobs", "-l", f"finetune-operator.io/job-name={name}", "-o", "name").split()
    assert len(jobs) == 1


def _kill_operators(world: World) -> None:
    world.cluster.kubectl_run(
        "-n", install.OPERATOR_NAMESPACE, "delete", "pod", "-l", "app.kubernetes.io/name=finetune-operator",
        "--grace-period=0", "--force",
    )  # fmt: skip


def test_a_finished_job_stays_finished_when_it_is_applied_again_and_its_pods_vanish(world: World) -> None:
    job = fine_tune_job("finished")
    name = world.apply(job)
    status = world.until_phase(name, "Succeeded")
    world.kubectl("delete", "jobs", "-l", f"finetune-operator.io/job-name={name}")
    world.apply(job)
    time.sleep(8)
    assert world.status(name) == status
    assert world.pods(name) == []
