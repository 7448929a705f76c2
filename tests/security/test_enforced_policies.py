"""What the NetworkPolicies of a job and of the operator let pass, on a network that enforces them.

The policies are those that the operator and the chart make. The pods have the labels and ports of
theirs, and busybox listens on them. Each target that a pod doesn't reach is reached by another one,
or by all while no policy is in force, so it was listening.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

import localcluster
from chart.support.helm_rendering import NAMESPACE, of_kind, render
from finetune_api import names
from finetune_api.status import Restarts
from finetune_operator.core.plan import plan
from finetune_operator.core.pods import manifests
from finetune_operator.core.pods.network_policy import network_policy
from finetune_operator.settings import Settings, parse
from k8s_operator.support.observed_states import a_job
from localcluster import Cluster, cluster
from testkit.busybox import BUSYBOX, busybox_archive

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster needs root"),
]
NAME = f"lcs-{os.getpid()}"
TEAM, ELSEWHERE, MONITORING = "team", "elsewhere", "monitoring"
OTHER = 40000  # a port that no policy names
RANKS = {"rank-0", "rank-1"}
NEIGHBORS = {"neighbor-1", "neighbor-2"}  # on the node of rank 0, and on the other one
COPYCAT, MONITOR, RELEASE = "copycat", "monitor", "release"  # the first has the labels of a rank
EVERYBODY = {*RANKS, *NEIGHBORS, COPYCAT, MONITOR, RELEASE}

Raw = dict[str, Any]
Reached = dict[str, set[str]]  # the pods that reach a target, by target
_TO_RANKS: Reached = {
    f"rank-{rank}:{port}": RANKS | ({MONITOR} if port == names.TRAINER_METRICS_PORT else set())
    for rank in (0, 1)
    for port in (names.RENDEZVOUS_PORT, names.TRAINER_METRICS_PORT, OTHER)
}
_TO_THE_OPERATOR: Reached = {
    f"operator:{names.OPERATOR_PROGRESS_PORT}": {*RANKS, COPYCAT},
    f"operator:{names.OPERATOR_METRICS_PORT}": {MONITOR, RELEASE},
    f"operator:{names.OPERATOR_PROBES_PORT}": EVERYBODY - RANKS,
    f"operator:{OTHER}": set(),
}
_TO_OTHERS: Reached = {
    "dns:53": EVERYBODY,
    "storage:9000": EVERYBODY,
    "api-server:6443": EVERYBODY - RANKS,
    f"neighbor-1:{OTHER}": EVERYBODY - RANKS,
}
_EXPECTED: Reached = {**_TO_RANKS, **_TO_THE_OPERATOR, **_TO_OTHERS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    one = localcluster.up(NAME, nodes=2, addons=("s3",), network_policies=True)
    one.load(str(busybox_archive(tmp_path_factory.mktemp("busybox"))))
    yield one
    cluster.down(NAME, purge=True)


@pytest.fixture(scope="module")
def rendered(made: Cluster, helm: str) -> list[Raw]:
    """The chart, by which jobs reach DNS and object storage, and a namespace reads metrics."""
    assert made.s3 is not None
    storage = urlsplit(made.s3.endpoint)
    egress = "networkPolicy.jobs.egress"
    return render(
        helm,
        f"{egress}[0].ports[0].port=53",
        f"{egress}[0].ports[0].protocol=UDP",
        f"{egress}[0].ports[1].port=53",
        f"{egress}[0].ports[1].protocol=TCP",
        f"{egress}[1].to[0].ipBlock.cidr={storage.hostname}/32",
        f"{egress}[1].ports[0].port={storage.port}",
    )


@pytest.fixture(scope="module")
def before(made: Cluster, rendered: list[Raw]) -> Reached:
    """Who reaches what while no policy is in force."""
    first, second = made.nodes
    spaces = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
              for name in (TEAM, ELSEWHERE, MONITORING, NAMESPACE)]  # fmt: skip
    labels, ports = _trainer(rendered)
    _apply(
        made,
        *spaces,
        _pod("rank-0", TEAM, first, labels, ports),
        _pod("rank-1", TEAM, second, labels, ports),
        _pod("neighbor-1", TEAM, first),
        _pod("neighbor-2", TEAM, second),
        _pod(COPYCAT, ELSEWHERE, first, labels, ports),
        _pod(MONITOR, MONITORING, second),
        _pod(RELEASE, NAMESPACE, second),
        _pod("operator", NAMESPACE, first, *_operator(rendered)),
    )
    for namespace in (TEAM, ELSEWHERE, MONITORING, NAMESPACE):
        made.kubectl("-n", namespace, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s")
    return _reached(made, dict.fromkeys(_EXPECTED, EVERYBODY))


@pytest.fixture(scope="module")
def reached(made: Cluster, rendered: list[Raw], before: Reached) -> Reached:
    """Who reaches what while the policies of the job and of the operator are in force."""
    job = a_job(distribution={"nodes": 2})
    _apply(made, network_policy(job, _settings(rendered)), *of_kind(rendered, "NetworkPolicy"))
    return _reached(made, _EXPECTED)


def test_without_policies_everybody_reaches_everything(before: Reached) -> None:
    assert before == dict.fromkeys(_EXPECTED, EVERYBODY)


def test_only_ranks_of_the_same_job_reach_a_rank_and_monitoring_reads_its_metrics(reached: Reached) -> None:
    assert {target: reached[target] for target in _TO_RANKS} == _TO_RANKS


def test_only_what_its_policy_names_reaches_the_operator(reached: Reached) -> None:
    assert {target: reached[target] for target in _TO_THE_OPERATOR} == _TO_THE_OPERATOR


def test_a_rank_reaches_dns_storage_and_the_operator_and_nothing_else(reached: Reached) -> None:
    assert {target for target, pods in reached.items() if pods & RANKS} == {
        *_TO_RANKS,
        f"operator:{names.OPERATOR_PROGRESS_PORT}",
        "dns:53",
        "storage:9000",
    }
    assert {target: reached[target] for target in _TO_OTHERS} == _TO_OTHERS


def _settings(rendered: list[Raw]) -> Settings:
    (config,) = [one for one in of_kind(rendered, "ConfigMap") if "config.yaml" in one["data"]]
    return parse(config["data"]["config.yaml"])


def _trainer(rendered: list[Raw]) -> tuple[Raw, list[Raw]]:
    """Returns labels and ports of the pods of a job."""
    job, settings = a_job(distribution={"nodes": 2}), _settings(rendered)
    template = manifests.attempt_job(job, plan(job, settings), settings, Restarts())["spec"]["template"]
    return template["metadata"]["labels"], template["spec"]["containers"][0]["ports"]


def _operator(rendered: list[Raw]) -> tuple[Raw, list[Raw]]:
    """Returns labels and ports of the operator's pods."""
    (deployment,) = of_kind(rendered, "Deployment")
    template = deployment["spec"]["template"]
    return template["metadata"]["labels"], template["spec"]["containers"][0]["ports"]


def _pod(name: str, namespace: str, node: str, labels: Mapping[str, str] | None = None, ports: Any = ()) -> Raw:
    """Returns a pod that listens on its ports, on that of the rendezvous, and on OTHER."""
    numbers = {port["containerPort"] for port in ports} | {names.RENDEZVOUS_PORT, OTHER}
    script = "/busybox mkdir -p /tmp; " + "".join(f"/busybox httpd -p {number} -h /tmp; " for number in sorted(numbers))
    container = {
        "name": "main",
        "image": BUSYBOX,
        "command": ["/busybox", "sh", "-c", f"{script} exec /busybox sleep 3600"],
        "securityContext": {"runAsUser": 0},
        "ports": list(ports),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels or {})},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]},
    }


def _apply(made: Cluster, *objects: Raw) -> None:
    made.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def _reached(made: Cluster, expected: Reached) -> Reached:
    """Returns who reaches what, once it is as expected, or else after a minute."""
    pods = {
        pod["metadata"]["name"]: pod
        for pod in json.loads(made.kubectl("get", "pods", "--all-namespaces", "-o", "json"))["items"]
    }
    server = dict.fromkeys(("dns", "storage", "api-server"), made.bridge_address)
    addresses = {**{name: pod["status"]["podIP"] for name, pod in pods.items()}, **server}
    targets = {}
    for target in expected:
        host, port = target.split(":")
        targets[f"{addresses[host]} {port}"] = target
    sources = [pods[name] for name in sorted(EVERYBODY)]
    end = time.monotonic() + 60
    while True:
        with ThreadPoolExecutor(len(sources)) as pool:
            answers = list(pool.map(lambda pod: _connections(made, pod, list(targets)), sources))
        reached: Reached = {target: set() for target in expected}
        for pod, connections in zip(sources, answers, strict=True):
            for connection in connections:
                reached[targets[connection]].add(pod["metadata"]["name"])
        if reached == expected or time.monotonic() > end:
            return reached


def _connections(made: Cluster, pod: Raw, targets: list[str]) -> list[str]:
    """Returns the targets, as "ADDRESS PORT", to which a pod can connect."""
    script = 'for target in "$@"; do /busybox nc -w 2 $target -e /busybox true 2>/dev/null && echo $target; done; true'
    command = ("/busybox", "sh", "-c", script, "probe", *targets)
    answer = made.kubectl("-n", pod["metadata"]["namespace"], "exec", pod["metadata"]["name"], "--", *command)
    return answer.splitlines()
