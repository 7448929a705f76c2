"""The operator dies at every write of a job's life, at three moments of each, and the job ends as
if nothing had happened: a life with failures, one that is applied again, and one whose destination
was another job's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import pytest

from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.messages.rivals import Rivals
from finetune_api.messages.run import parse
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
_CLAIMED = Result(outcome="failed", reason="OutputOccupied", message="output.uri: claimed by first")
_TIMES = ("startTime", "completionTime", "pausedSeconds", "pausedSince", "lastTransitionTime", "updateTime")
# What every life writes. Which phases in between are written, and which Events, depends on
# time: an Event that is lost with the operator does no harm.
_WRITES = {
    "troubled": {
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
    },
    "applied again": {
        "create jobs steady-1",
        "patch status Running, attempt 1",
        "again, create networkpolicies steady-pods",
        "again, create services steady-ranks",
        "again, create jobs steady-1",
        "again, patch status Running, attempt 1",
        "again, patch status Succeeded, attempt 1",
    },
    "taken over": {
        "create jobs first-check",
        "create jobs first-1",
        "create jobs steady-check",
        "patch status Failed, attempt 0",
        "again, patch status Pending (Retrying), attempt 0",
        "again, delete jobs steady-check",
        "again, create jobs steady-check",
        "again, create jobs steady-1",
        "again, patch status Succeeded, attempt 1",
    },
}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Life:
    """How a job ended, and what the operator wrote and died at meanwhile."""

    status: Raw
    objects: frozenset[str]
    writes: dict[str, int]
    deaths: tuple[str, ...]


def _live(kubeconfig: Any, life: str, moment: Moment | None) -> Life:
    """Plays a life, and returns how it ended."""
    world = World(kubeconfig, f"crash-{os.getpid()}-{next(_numbers)}")
    _create_namespace(world)
    with MortalOperator(kubeconfig, world.namespace, _SETTINGS, moment) as operator:
        _LIVES[life](world, operator)
        world.wait_phase("steady", "Succeeded", 30)
    status = world.status("steady")
    objects = frozenset(_objects(world))
    world.request("DELETE", f"/api/v1/namespaces/{world.namespace}")
    return Life(status, objects, operator.writes, tuple(operator.deaths))


def _troubled(world: World, _: MortalOperator) -> None:
    """A preflight check, a failed node, a suspension, bad data, and a retry that takes over the
    destination."""
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

    _succeed(world, "steady-4", 4)
    world.wait(lambda: len(world.all("jobs")) == 3, 30)  # the check and the two newest attempts


def _applied_again(world: World, operator: MortalOperator) -> None:
    """A job is deleted while it trains, and applied again while its pods still stop."""
    world.submit("steady", distribution={"nodes": 2})
    world.run_pods("steady-1", 2)
    world.wait(lambda: _is_running(world, 1), 30)
    former = (world.get("finetunejobs", "steady") or {})["metadata"]["uid"]
    world.delete("finetunejobs", "steady", propagationPolicy="Background")
    world.wait(lambda: world.get("finetunejobs", "steady") is None, 30)
    operator.era = "again, "
    world.submit("steady", distribution={"nodes": 2})
    world.leave("steady-1")
    world.wait(lambda: _owner(world, "steady-1") not in ("", former), 60)
    _succeed(world, "steady-1", 1)


def _taken_over(world: World, operator: MortalOperator) -> None:
    """A job finds its output claimed, and is tried again when the owner was deleted between its
    check and its training, which leaves the claim."""
    former = world.submit("first", distribution={"nodes": 2}, resources={"gpu": {}})["metadata"]["uid"]
    (check,) = world.run_pods("first-check")
    world.end_pod(check, 0, Result(outcome="succeeded"))
    world.wait_pods("first-1", 2)  # for which there are no GPUs

    world.submit("steady", distribution={"nodes": 2}, resources={"gpu": {}})
    (check,) = world.run_pods("steady-check")
    assert _rivals(check).include(former)
    world.end_pod(check, 67, _CLAIMED)
    world.wait_phase("steady", "Failed", 30)

    world.delete("finetunejobs", "first", propagationPolicy="Background")
    world.wait(lambda: not any(_of(world, "first")), 60)
    operator.era = "again, "
    answer = world.patch("finetunejobs", "steady", {"spec": {"runPolicy": {"retry": 1}}})
    assert answer.accepted, answer.message
    failed_check = check["metadata"]["uid"]
    world.wait(lambda: all(pod["metadata"]["uid"] != failed_check for pod in _checks(world)) and _checks(world), 30)
    (check,) = world.run_pods("steady-check")
    assert not _rivals(check).include(former)
    world.end_pod(check, 0, Result(outcome="succeeded"))
    _succeed(world, "steady-1", 1)


_LIVES: dict[str, Callable[[World, MortalOperator], None]] = {
    "troubled": _troubled, "applied again": _applied_again, "taken over": _taken_over,
}  # fmt: skip


def _succeed(world: World, job: str, attempt: int) -> None:
    """Ends an attempt of two pods as one that has trained."""
    pods = world.run_pods(job, 2)
    world.wait(lambda: _is_running(world, attempt), 30)
    for pod in pods:
        world.end_pod(pod, 0, _DONE)


def _of(world: World, job: str) -> Iterator[str]:
    """Yields the names of what a job has left: its objects and its pods."""
    for resource in ("finetunejobs", "jobs", "pods", "services", "networkpolicies"):
        for item in world.all(resource):
            if item["metadata"]["name"].startswith(job):
                yield item["metadata"]["name"]


def _checks(world: World) -> list[Raw]:
    return world.all("pods", **{"batch.kubernetes.io/job-name": "steady-check"})


def _rivals(pod: Raw) -> Rivals:
    """Returns the jobs whose claims count, as a pod's configuration has them."""
    known = parse(pod["metadata"]["annotations"][names.ANNOTATION_RUN_CONFIG]).rivals
    assert known is not None
    return known


def _owner(world: World, job: str) -> str:
    """Returns the uid of the FineTuneJob that owns a Job; empty if there is no such Job."""
    references = (world.get("jobs", job) or {}).get("metadata", {}).get("ownerReferences", ())
    return next((str(reference["uid"]) for reference in references), "")


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


@pytest.fixture(scope="module", params=_LIVES)
def lives(request: pytest.FixtureRequest, crd: Any, node: None) -> tuple[str, dict[Moment | None, Life]]:
    """One of the lives without deaths, and once for each moment, side by side."""
    moments: tuple[Moment | None, ...] = (None, *get_args(Moment))
    with ThreadPoolExecutor(len(moments)) as pool:
        ends = pool.map(lambda moment: _live(crd.kubeconfig, request.param, moment), moments)
        return request.param, dict(zip(moments, ends, strict=True))


@pytest.mark.parametrize("moment", get_args(Moment))
def test_an_operator_that_dies_at_each_of_its_writes_ends_the_job_as_if_it_had_not(
    lives: tuple[str, dict[Moment | None, Life]], moment: Moment
) -> None:
    writes, steady, crashed = _WRITES[lives[0]], lives[1][None], lives[1][moment]
    assert set(steady.writes) >= writes
    assert set(crashed.deaths) >= writes
    assert sorted(crashed.deaths) == sorted(crashed.writes)
    assert _without_times(crashed.status) == _without_times(steady.status)
    assert crashed.objects == steady.objects
