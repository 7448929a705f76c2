"""A job on two nodes, one of which is drained, falls silent, or loses its power: it goes on on the
other node, and ends with the same bytes as a job that nothing disturbed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from demo import clusters
from e2e.support.jobs import World, fine_tune_job
from finetune_api.names import HISTORY_PATH

_STEPS, _DISTURBED_AT = 200, 25
_UNREACHABLE = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}


def _job(name: str) -> dict[str, Any]:
    return fine_tune_job(
        name,
        training={"maxSteps": _STEPS, "globalBatchSize": 8, "learningRate": 1e-3, "evalEverySteps": 0},
        checkpoint={"every": 10},
        distribution={"nodes": 2, "processesPerNode": 1, "strategy": "ddp"},
        resources={"cpu": "600m", "memory": "3Gi", "scratch": "2Gi", "sharedMemory": "128Mi"},
        pod={"tolerations": [{**_UNREACHABLE, "tolerationSeconds": 5}], "terminationGracePeriodSeconds": 20},
    )


@pytest.fixture(scope="module")
def undisturbed(world: World) -> bytes:
    """Return the adapter of the same job without any trouble."""
    name = world.apply(_job("undisturbed"))
    world.until_phase(name, "Succeeded", seconds=300)
    assert len(_nodes(world, name)) == 2
    return world.download(name, "adapter_model.safetensors")


@pytest.fixture
def second_node(world: World) -> Iterator[str]:
    """Return the second node's name, and bring the node back afterwards."""
    name = f"{world.cluster.name}-node-2"
    yield name
    _fault(world, "off")
    _fault(world, "on")
    end = time.monotonic() + 120
    while world.cluster.kubectl_run("uncordon", name, check=False) == "":
        assert time.monotonic() < end, f"{name} didn't register"
        time.sleep(1)
    world.cluster.kubectl_run("wait", "--for=condition=Ready", f"node/{name}", "--timeout=120s")


@pytest.mark.parametrize("deed", ["drain", "cut", "delete"])
def test_a_job_goes_on_without_a_node(world: World, undisturbed: bytes, second_node: str, deed: str) -> None:
    name = world.apply(_job(f"node-{deed}"))
    world.until_step(name, _DISTURBED_AT)
    assert _nodes(world, name) == {f"{world.cluster.name}-node", second_node}
    began = time.monotonic()
    _do(world, deed, second_node)
    if deed == "cut":
        world.until(name, lambda status: second_node in json.dumps(status), 180, f"naming {second_node}")
        print(f"{deed}: named in status after {time.monotonic() - began:.0f} s")
    status = world.until(name, lambda status: status.get("attempt") == 2, 400, "at attempt 2")
    print(f"{deed}: attempt 2 after {time.monotonic() - began:.0f} s, {json.dumps(status.get('restarts'))}")
    assert status["restarts"]["application"] == 0
    resumed = world.until(name, lambda status: status["progress"].get("step", 0) > _DISTURBED_AT, 180, "training again")
    print(f"{deed}: trains again after {time.monotonic() - began:.0f} s, at step {resumed['progress']['step']}")
    world.until_phase(name, "Succeeded", seconds=300)
    steps = [event["step"] for event in _history(world, name) if event["type"] == "step"]
    assert steps == list(range(1, _STEPS + 1)), "a step is missing or was reported twice"
    assert world.download(name, "adapter_model.safetensors") == undisturbed


def _do(world: World, deed: str, node: str) -> None:
    if deed == "drain":
        world.cluster.kubectl_run(
            "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s"
        )
    elif deed == "cut":
        _fault(world, "cut")
    else:
        _fault(world, "off")
        world.cluster.kubectl_run("delete", "node", node, "--wait=false")


def _fault(world: World, kind: str) -> None:
    clusters.tool("localcluster", "fault", "--name", world.cluster.name, "2", kind)


def _nodes(world: World, name: str) -> set[str]:
    return {pod["spec"]["nodeName"] for pod in world.pods(name)}


def _history(world: World, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in world.download(name, HISTORY_PATH).decode().splitlines()]
