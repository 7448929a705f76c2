"""A job on two nodes, one of which is drained, falls silent, or loses its power: it goes on on the
other node, and ends with the same bytes as a job that nothing disturbed.

The jobs run at the same time on one cluster. They share the first node; the second node of each is
its own, and only that one is disturbed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import pytest

from demo import clusters
from e2e.support.jobs import World, fine_tune_job
from e2e.support.worlds import shared_world
from finetune_api.names import HISTORY_PATH

pytestmark = pytest.mark.e2e
_CLUSTER = "nodes"
_FIRST = f"{_CLUSTER}-node"
_DISTURBED = {"drain": 2, "cut": 3, "delete": 4}  # numbers of nodes by deed
_HOSTNAME = "kubernetes.io/hostname"
_STEPS, _DISTURBED_AT = 200, 25
_UNREACHABLE = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}


@dataclass(frozen=True)
class Results:
    """The adapters of the jobs, as soon as they end."""

    undisturbed: Future[bytes]
    disturbed: Mapping[str, Future[bytes]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Starts all jobs, on a cluster whose first node has the operator."""
    on_first = "nodeSelector." + _HOSTNAME.replace(".", "\\.") + f"={_FIRST}"
    scratch = tmp_path_factory.mktemp("assets")
    offered = f"tenants.nodeLabelKeys[0]={_HOSTNAME}"
    world = shared_world(_CLUSTER, scratch, on_first, offered, nodes=1 + len(_DISTURBED))
    undisturbed = _in_background(lambda: _undisturbed(world))
    disturbed = {deed: _in_background(partial(_disturbed, world, deed, undisturbed)) for deed in _DISTURBED}
    return Results(undisturbed, disturbed)


def _in_background(run: Callable[[], bytes]) -> Future[bytes]:
    """Starts a thread that ends with the process, so that Ctrl-C doesn't wait for it."""
    future = Future[bytes]()

    def complete() -> None:
        try:
            future.set_result(run())
        except Exception as error:
            future.set_exception(error)

    Thread(target=complete, daemon=True).start()
    return future


@pytest.mark.parametrize("deed", _DISTURBED)
def test_a_job_goes_on_without_a_node(results: Results, deed: str) -> None:
    assert results.disturbed[deed].result() == results.undisturbed.result()


def _undisturbed(world: World) -> bytes:
    """Returns the adapter of a job without any trouble, on the node that is deleted afterwards."""
    name = world.apply(_job("undisturbed", _node("delete")))
    world.until_phase(name, "Succeeded", seconds=600)
    assert _nodes(world, name) == {_FIRST, _node("delete")}
    return world.download(name, "adapter_model.safetensors")


def _disturbed(world: World, deed: str, undisturbed: Future[bytes]) -> bytes:
    """Returns the adapter of a job that loses its second node."""
    node = _node(deed)
    if deed == "delete":
        undisturbed.result()
    name = world.apply(_job(f"node-{deed}", node))
    world.until_step(name, _DISTURBED_AT, seconds=400)
    assert _nodes(world, name) == {_FIRST, node}
    began = time.monotonic()
    _do(world, deed, node)
    if deed == "cut":
        world.until(name, lambda status: node in json.dumps(status), 180, f"naming {node}")
        print(f"{deed}: named in status after {time.monotonic() - began:.0f} s")
    status = world.until(name, lambda status: status.get("attempt") == 2, 400, "at attempt 2")
    print(f"{deed}: attempt 2 after {time.monotonic() - began:.0f} s, {json.dumps(status.get('restarts'))}")
    assert status["restarts"]["application"] == 0
    resumed = world.until(name, lambda status: status["progress"].get("step", 0) > _DISTURBED_AT, 300, "training again")
    print(f"{deed}: trains again after {time.monotonic() - began:.0f} s, at step {resumed['progress']['step']}")
    world.until_phase(name, "Succeeded", seconds=400)
    steps = [event["step"] for event in _history(world, name) if event["type"] == "step"]
    assert steps == list(range(1, _STEPS + 1)), "a step is missing or was reported twice"
    return world.download(name, "adapter_model.safetensors")


def _job(name: str, second_node: str) -> dict[str, Any]:
    return fine_tune_job(
        name,
        training={"maxSteps": _STEPS, "globalBatchSize": 8, "learningRate": 1e-3, "evalEverySteps": 0},
        checkpoint={"every": 10},
        distribution={"nodes": 2, "processesPerNode": 1, "strategy": "ddp"},
        resources={"cpu": "200m", "memory": "2Gi", "scratch": "2Gi", "sharedMemory": "128Mi"},
        pod={
            "tolerations": [{**_UNREACHABLE, "tolerationSeconds": 5}],
            "terminationGracePeriodSeconds": 20,
            "nodeAffinity": {"required": [{"key": _HOSTNAME, "operator": "In", "values": [_FIRST, second_node]}]},
        },
    )


def _do(world: World, deed: str, node: str) -> None:
    if deed == "drain":
        world.cluster.kubectl_run(
            "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s"
        )
    elif deed == "cut":
        _fault(deed, "cut")
    else:
        _fault(deed, "off")
        world.cluster.kubectl_run("delete", "node", node, "--wait=false")


def _fault(deed: str, kind: str) -> None:
    clusters.tool("localcluster", "fault", "--name", _CLUSTER, str(_DISTURBED[deed]), kind)


def _node(deed: str) -> str:
    return f"{_CLUSTER}-node-{_DISTURBED[deed]}"


def _nodes(world: World, name: str) -> set[str]:
    return {pod["spec"]["nodeName"] for pod in world.pods(name)}


def _history(world: World, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in world.download(name, HISTORY_PATH).decode().splitlines()]
