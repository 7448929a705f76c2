"""Two groups that don't fit onto the nodes together, on a real API server with the real Job
controller. The test plays the scheduler, which serves both groups in turn, and the kubelets."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.messages.result import Result
from finetune_api.status import Restarts
from k8s_operator.support.kubelet_stand_in import World
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster

_NODES = 6
_PODS = 4
_JOBS = ("first", "second")


class _PlayedCluster:
    """Nodes with room for one pod each, and what a scheduler and their kubelets do."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._nodes = [f"{world.namespace}-{number}" for number in range(_NODES)]
        self.most_nodes = dict.fromkeys(_JOBS, 0)  # that a group has had at once before it ran
        for name in self._nodes:
            body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
            assert world.request("POST", "/api/v1/nodes", body).accepted

    def delete(self) -> None:
        for name in self._nodes:
            self._world.request("DELETE", f"/api/v1/nodes/{name}")

    def play(self) -> None:
        """Binds the pods that wait, one of each group in turn, and ends complete groups."""
        pods = {job: self._live(job) for job in _JOBS}
        taken = {pod["spec"].get("nodeName") for group in pods.values() for pod in group}
        free = [node for node in self._nodes if node not in taken]
        waiting = [pod for group in pods.values() for pod in group if not pod["spec"].get("nodeName")]
        for pod, node in zip(sorted(waiting, key=_index), free, strict=False):
            self._bind(pod, node)
        for job, group in pods.items():
            bound = [pod for pod in group if pod["spec"].get("nodeName")]
            self.most_nodes[job] = max(self.most_nodes[job], len(bound))
            if len(bound) == _PODS:
                for pod in bound:
                    self._world.end_pod(pod, result=Result(outcome="succeeded"))

    def _live(self, job: str) -> list[Any]:
        pods = self._world.all("pods", **{"batch.kubernetes.io/job-name": f"{job}-1"})
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"]:
                self._world.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=0)
        live = [pod for pod in pods if pod["status"].get("phase") in ("Pending", "Running")]
        return [pod for pod in live if "deletionTimestamp" not in pod["metadata"]]

    def _bind(self, pod: Any, node: str) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        name = pod["metadata"]["name"]
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        self._world.request("POST", self._world.path("pods", name) + "/binding", body)


def _index(pod: Any) -> tuple[str, str]:
    return (pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"], pod["metadata"]["name"])


def test_two_groups_that_hold_a_part_of_the_nodes_each_both_finish(
    world: World, operators: Callable[..., Operator]
) -> None:
    operators(pods={"schedulerName": "played"}).start()
    cluster = _PlayedCluster(world)
    try:
        for job in _JOBS:
            world.submit(job, distribution={"nodes": _PODS}, run_policy={"schedulingTimeoutSeconds": 5})
        for job in _JOBS:
            world.wait_pods(f"{job}-1", _PODS)
        cluster.play()
        cluster.play()
        assert cluster.most_nodes == {"first": 3, "second": 3}, "each group holds a part"
        messages: set[str] = set()
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and not all(world.status(job).get("completionTime") for job in _JOBS):
            cluster.play()
            messages |= {world.message(job) for job in _JOBS}
            time.sleep(0.2)
        statuses = [world.status(job) for job in _JOBS]
        assert [status["phase"] for status in statuses] == ["Succeeded", "Succeeded"]
        assert [Restarts(**status["restarts"]) for status in statuses] == [Restarts(), Restarts()]
        assert [status["attempt"] for status in statuses] == [1, 1]
        assert any("given back" in message and "the next try starts at" in message for message in messages), messages
    finally:
        cluster.delete()
