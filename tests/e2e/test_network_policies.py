"""What the NetworkPolicies of a job and of the operator let pass, on a network that enforces them.

Pods of several kinds try to connect to everything. Each target that a pod doesn't reach is reached
by another pod, so it was listening.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest

from demo import install, watch
from e2e.support.jobs import NAMESPACE, World, fine_tune_job
from e2e.support.probes import NAME, PORT, Pod, probe
from e2e.support.worlds import MONITORING
from finetune_api import names

ELSEWHERE = "e2e-elsewhere"
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")  # two processes may run tests of this file
_TWO_PODS = {
    "distribution": {"nodes": 2, "processesPerNode": 1, "strategy": "ddp"},
    "resources": {"cpu": "300m", "memory": "2Gi", "scratch": "2Gi", "sharedMemory": "128Mi"},
}
RANKS = {"rank 0", "rank 1"}
NEIGHBORS = {"neighbor on node 1", "neighbor on node 2"}
COPYCAT = "pod with the labels of a rank in another namespace"
MONITOR = "pod of the namespace for monitoring"
RELEASE = "pod of the operator's namespace"
OTHERS = NEIGHBORS | {COPYCAT, MONITOR, RELEASE}

Reached = Mapping[str, set[str]]  # the sources that reach a target, by target
_TO_RANKS = {
    "rank 0: rendezvous": RANKS,
    "rank 0: metrics": RANKS | {MONITOR},
    "rank 1: metrics": RANKS | {MONITOR},
    "rank 0: another port": RANKS,
}
_TO_THE_OPERATOR = {
    "operator: progress": RANKS | {COPYCAT},
    "operator: metrics": {MONITOR, RELEASE},
    "operator: probes": OTHERS,
    "operator: another port": {"operator"},
}
_FROM_RANKS = {
    "a name": RANKS | OTHERS,
    "object storage": RANKS | OTHERS,
    "API server": OTHERS,
    "neighbor": OTHERS,
}
_EXPECTED = {**_TO_RANKS, **_TO_THE_OPERATOR, **_FROM_RANKS}


@pytest.fixture(scope="module")
def training(world: World) -> Iterator[list[Pod]]:
    """The pods of a job that trains until it is deleted."""
    recipe = {"maxSteps": 1_000_000, "globalBatchSize": 8, "learningRate": 1e-6, "evalEverySteps": 0}
    name = world.apply(
        fine_tune_job(f"endless-{_WORKER}", training=recipe, checkpoint={"every": 1_000_000}, **_TWO_PODS)
    )
    world.until_phase(name, "Running")
    world.until(name, lambda status: (status.get("progress") or {}).get("step", 0) > 0, what="training")
    yield [Pod(world.cluster, NAMESPACE, pod) for pod in sorted(world.live_pods(name))]
    world.delete(name)


@pytest.fixture(scope="module")
def reached(world: World, training: list[Pod]) -> Iterator[Reached]:
    with ExitStack() as stack:
        sources = _sources(world, training, stack)
        targets = _targets(world, training, sources["neighbor on node 1"], stack)
        yield _reached(sources, targets)


def test_only_ranks_of_the_same_job_reach_a_rank_and_monitoring_reads_its_metrics(reached: Reached) -> None:
    assert {target: reached[target] for target in _TO_RANKS} == _TO_RANKS


def test_a_rank_reaches_dns_storage_and_the_operator_and_nothing_else(reached: Reached) -> None:
    assert {target for target, sources in reached.items() if sources & RANKS} == {
        *_TO_RANKS,
        "operator: progress",
        "a name",
        "object storage",
    }
    assert {target: reached[target] for target in _FROM_RANKS} == _FROM_RANKS


def test_only_what_its_policy_names_reaches_the_operator(reached: Reached) -> None:
    assert {target: reached[target] for target in _TO_THE_OPERATOR} == _TO_THE_OPERATOR


def test_prometheus_reads_the_metrics_of_each_pod(world: World, training: list[Pod]) -> None:
    pods = "|".join(pod.name for pod in training)
    query = f'count(up{{namespace="{NAMESPACE}",pod=~"{pods}"}} == 1)'
    _wait_until(lambda: watch.newest(world.cluster, query) == len(training), f"2 for {query}")


def test_a_job_of_two_pods_ends(world: World) -> None:
    name = world.apply(fine_tune_job(f"closed-{_WORKER}", **_TWO_PODS))
    world.until_phase(name, "Succeeded", seconds=300)
    policy = json.loads(world.kubectl("get", "networkpolicy", names.network_policy_name(name), "-o", "json"))
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


def _sources(world: World, training: list[Pod], stack: ExitStack) -> dict[str, Pod]:
    """Creates the pods that aren't ranks; returns all by what they are called."""
    for namespace in (ELSEWHERE, MONITORING):
        install.namespace(world.cluster, namespace)
    nodes = [pod.manifest["spec"]["nodeName"] for pod in training]
    other = next((node for node in _node_names(world) if node != nodes[0]), nodes[0])
    labels = training[0].manifest["metadata"]["labels"]
    ours = {name: value for name, value in labels.items() if not name.startswith(("batch.", "controller-", "job-"))}
    pods = {
        "neighbor on node 1": (NAMESPACE, _probe(world, "neighbor-1", node=nodes[0])),
        "neighbor on node 2": (NAMESPACE, _probe(world, "neighbor-2", node=other)),
        COPYCAT: (ELSEWHERE, _probe(world, "copycat", node=nodes[0], labels=ours)),
        MONITOR: (MONITORING, _probe(world, "monitor")),
        RELEASE: (install.OPERATOR_NAMESPACE, _probe(world, "release")),
    }
    made = {}
    for name, (namespace, pod) in pods.items():
        made[name] = Pod(world.cluster, namespace, pod["metadata"]["name"])
        world.cluster.kubectl_run("-n", namespace, "apply", "-f", "-", stdin=json.dumps(pod))
        stack.callback(_delete, made[name])
    for pod in made.values():
        condition = ("--for=condition=Ready", f"pod/{pod.name}", "--timeout=60s")
        world.cluster.kubectl_run("-n", pod.namespace, "wait", *condition)
    return {"rank 0": training[0], "rank 1": training[1], **made, "operator": _operator(world)}


def _probe(world: World, name: str, **options: Any) -> dict[str, Any]:
    return probe(f"{name}-{_WORKER}", world.trainer_image, **options)


def _delete(pod: Pod) -> None:
    pod.cluster.kubectl_run("-n", pod.namespace, "delete", "pod", pod.name, "--wait=false")


def _node_names(world: World) -> list[str]:
    return world.kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.name}").split()


def _operator(world: World) -> Pod:
    """Returns the pod of a replica."""
    chosen = ("-l", "app.kubernetes.io/name=finetune-operator", "-o", "jsonpath={.items[0].metadata.name}")
    name = world.cluster.kubectl_run("-n", install.OPERATOR_NAMESPACE, "get", "pods", *chosen)
    return Pod(world.cluster, install.OPERATOR_NAMESPACE, name)


def _targets(world: World, training: list[Pod], neighbor: Pod, stack: ExitStack) -> dict[str, tuple[str, int]]:
    operator, storage = _operator(world), urlsplit(world.cluster.s3_endpoint)
    first, second = (pod.address for pod in training)
    return {
        "rank 0: rendezvous": (first, names.RENDEZVOUS_PORT),
        "rank 0: metrics": (first, names.TRAINER_METRICS_PORT),
        "rank 1: metrics": (second, names.TRAINER_METRICS_PORT),
        "rank 0: another port": (first, stack.enter_context(training[0].listening())),
        "operator: progress": (operator.address, names.OPERATOR_PROGRESS_PORT),
        "operator: metrics": (operator.address, names.OPERATOR_METRICS_PORT),
        "operator: probes": (operator.address, names.OPERATOR_PROBES_PORT),
        "operator: another port": (operator.address, stack.enter_context(operator.listening())),
        "a name": ("kubernetes.default.svc.cluster.local", NAME),
        "object storage": (storage.hostname or "", storage.port or 0),
        "API server": ("kubernetes.default.svc.cluster.local", 443),
        "neighbor": (neighbor.address, PORT),
    }


def _reached(sources: Mapping[str, Pod], targets: Mapping[str, tuple[str, int]]) -> Reached:
    """Returns who reaches what, once it is as expected, or else after 30 seconds. The operator
    connects only to itself, which no policy forbids, so that its port was listening."""
    own = {name: target for name, target in targets.items() if name == "operator: another port"}
    end = time.monotonic() + 30
    while True:
        with ThreadPoolExecutor(len(sources)) as pool:
            answers = {
                name: pool.submit(partial(pod.reached, own if name == "operator" else targets))
                for name, pod in sources.items()
            }
        reached = {
            target: {name for name, answer in answers.items() if target in answer.result()} for target in targets
        }
        if reached == _EXPECTED or time.monotonic() > end:
            return reached


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, f"not {what}"
        time.sleep(1)
