"""The operator dies at every write of a job's life, at three moments of each, and the job ends as
if nothing had happened."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import pytest

from finetune_api.messages.result import Result
from finetune_api.status import ArtifactStatus
from finetune_operator.settings import ProgressSettings, Settings
from k8s_operator.support.kubelet_stand_in import Raw, World
from k8s_operator.support.mortal_operator import Moment, MortalOperator

pytestmark = pytest.mark.cluster

_SETTINGS = Settings(
    trainer_image="example.test/trainer:1", progress=ProgressSettings(url="http://127.0.0.1:1", port=0)
)
_DONE = Result(
    outcome="succeeded",
    artifact=ArtifactStatus(uri="s3://outputs/result", manifest_digest="sha256:abc", size_bytes=1),
)
_FAILED = {
    1: Result(outcome="failed", reason="RankKilled", message="signal 9"),
    3: Result(outcome="failed", reason="DatasetInvalid", message="row 7 has no text"),
}
_TIMES = ("startTime", "completionTime", "pausedSeconds", "pausedSince", "lastTransitionTime", "updateTime")
# What every such life writes. Which phases in between are written, and which Events, depends on
# time: an Event that is lost with the operator does no harm.
_WRITES = {
    "create networkpolicies steady-pods",
    "create jobs steady-check",
    "create services steady-ranks",
    *(f"create jobs steady-{attempt}" for attempt in (1, 2, 3, 4)),
    *(f"patch status Running, attempt {attempt}" for attempt in (1, 2, 3, 4)),
    "patch status Running (Suspending), attempt 2",
    "delete jobs steady-2",
    "patch status Suspended (Suspended), attempt 2",
    "delete jobs steady-1",
    "patch status Failed, attempt 3",
    "patch status Restarting (Retrying), attempt 3",
    "patch status Succeeded, attempt 4",
}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Life:
    """How a job ended, and what the operator wrote and died at meanwhile."""

    status: Raw
    objects: frozenset[str]
    writes: dict[str, int]
    deaths: tuple[str, ...]


def _live(kubeconfig: Any, moment: Moment | None) -> Life:
    """Plays a life: a preflight check, a failed node, a suspension, bad data, a retry that takes
    over the destination, and success."""
    world = World(kubeconfig, f"crash-{os.getpid()}-{next(_numbers)}")
    _create_namespace(world)
    with MortalOperator(kubeconfig, world.namespace, _SETTINGS, moment) as operator:
        world.submit("steady", distribution={"nodes": 2}, resources={"gpu": {}})
        (check,) = world.run_pods("steady-check")
        world.end_pod(check, 0, Result(outcome="succeeded"))

        pods = world.run_pods("steady-1", 2)
        world.wait_phase("steady", "Running", 30)
        world.end_pod(pods[1], 72, _FAILED[1])
        world.leave("steady-1", 75, Result(outcome="failed", reason="PeerLost"))

        world.run_pods("steady-2", 2)
        world.wait(lambda: _is_running(world, 2), 30)
        world.suspend("steady")
        world.leave("steady-2")
        world.wait_phase("steady", "Suspended", 30)
        world.suspend("steady", False)

        pods = world.run_pods("steady-3", 2)
        world.wait(lambda: _is_running(world, 3), 30)
        for pod in pods:
            world.end_pod(pod, 65, _FAILED[3])
        world.wait_phase("steady", "Failed", 30)
        change = {"runPolicy": {"retry": 1}, "output": {"existing": "discard"}}
        answer = world.patch("finetunejobs", "steady", {"spec": change})
        assert answer.accepted, answer.message

        pods = world.run_pods("steady-4", 2)
        world.wait(lambda: _is_running(world, 4), 30)
        for pod in pods:
            world.end_pod(pod, 0, _DONE)
        world.wait_phase("steady", "Succeeded", 30)
        world.wait(lambda: len(world.all("jobs")) == 3, 30)  # the check and the two newest attempts
    status = world.status("steady")
    objects = frozenset(_objects(world))
    world.request("DELETE", f"/api/v1/namespaces/{world.namespace}")
    return Life(status, objects, operator.writes, tuple(operator.deaths))


def _create_namespace(world: World) -> None:
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": world.namespace}}
    answer = world.request("POST", "/api/v1/namespaces", body)
    assert answer.accepted, answer.message
    world.wait(lambda: world.get("serviceaccounts", "default"))


def _is_running(world: World, attempt: int) -> bool:
    status = world.status("steady")
    return (status.get("phase"), status.get("attempt")) == ("Running", attempt)


def _objects(world: World) -> Iterator[str]:
    """Yields what the operator has created and what remains, without Events."""
    for resource in ("jobs", "services", "networkpolicies"):
        for item in world.all(resource):
            annotations = item["metadata"].get("annotations", {})
            digests = [value for key, value in annotations.items() if key.startswith("finetune-operator.io/")]
            yield f"{resource} {item['metadata']['name']} {sorted(digests)}"


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in _TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def lives(crd: Any, node: None) -> dict[Moment | None, Life]:
    """A life without deaths, and one for each moment, side by side."""
    moments: tuple[Moment | None, ...] = (None, *get_args(Moment))
    with ThreadPoolExecutor(len(moments)) as pool:
        return dict(zip(moments, pool.map(lambda moment: _live(crd.kubeconfig, moment), moments), strict=True))


@pytest.mark.parametrize("moment", get_args(Moment))
def test_an_operator_that_dies_at_each_of_its_writes_ends_the_job_as_if_it_had_not(
    lives: dict[Moment | None, Life], moment: Moment
) -> None:
    steady, crashed = lives[None], lives[moment]
    assert set(steady.writes) >= _WRITES
    assert set(crashed.deaths) >= _WRITES
    assert sorted(crashed.deaths) == sorted(crashed.writes)
    assert _without_times(crashed.status) == _without_times(steady.status)
    assert crashed.objects == steady.objects
