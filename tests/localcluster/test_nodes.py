"""A real cluster with three nodes: pods reach each other across them, and Kubernetes notices a node
that is cut off and one whose power fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import localcluster
from localcluster import Cluster, LocalClusterError, cluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster needs root"),
]
NAME = f"lcw-{os.getpid()}"
IMAGE = "localhost/localcluster-busybox:test"


@pytest.fixture(scope="module")
def made(busybox: Path) -> Iterator[Cluster]:
    one = localcluster.up(NAME, nodes=3)
    one.load(str(busybox))
    yield one
    cluster.down(NAME, purge=True)


def test_a_job_is_spread_over_the_nodes_and_its_pods_find_each_other(made: Cluster) -> None:
    script = (
        "/busybox mkdir -p /tmp/w; echo $JOB_COMPLETION_INDEX > /tmp/w/index; /busybox httpd -p 7000 -h /tmp/w; "
        "for peer in 0 1 2; do "
        "until /busybox wget -qO- http://peers-$peer.peers.default.svc.cluster.local:7000/index 2>/dev/null; "
        "do /busybox sleep 0.2; done; done; /busybox sleep 10"
    )
    container: dict[str, Any] = {"name": "main", "image": IMAGE, "command": ["/busybox", "sh", "-c", script]}
    container["securityContext"] = {"runAsUser": 0}
    template = {
        "metadata": {"labels": {"app": "peers"}},
        "spec": {
            "subdomain": "peers",
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "DoNotSchedule",
                    "labelSelector": {"matchLabels": {"app": "peers"}},
                }
            ],
            "containers": [container],
        },
    }
    service = {"clusterIP": "None", "selector": {"app": "peers"}, "publishNotReadyAddresses": True}
    job = {"completions": 3, "parallelism": 3, "completionMode": "Indexed", "backoffLimit": 0, "template": template}
    objects = [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "peers"}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "peers"}, "spec": job},
    ]
    made.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    made.kubectl("wait", "--for=condition=Complete", "job/peers", "--timeout=120s")
    pods = json.loads(made.kubectl("get", "pods", "--selector=app=peers", "-o", "json"))["items"]
    assert {pod["spec"]["nodeName"] for pod in pods} == set(made.nodes)
    for pod in pods:
        assert made.kubectl("logs", pod["metadata"]["name"]).split() == ["0", "1", "2"]


def test_a_node_that_is_cut_off_or_switched_off_is_noticed_and_comes_back(made: Cluster) -> None:
    made.fault(2, "cut")
    made.fault(3, "off")
    for name in made.nodes[1:]:
        made.kubectl("wait", "--for=condition=Ready=Unknown", f"node/{name}", "--timeout=180s")
    made.kubectl("wait", "--for=condition=Ready", f"node/{made.nodes[0]}", "--timeout=1s")
    made.fault(2, "connect")
    made.fault(3, "on")
    for name in made.nodes[1:]:
        made.kubectl("wait", "--for=condition=Ready", f"node/{name}", "--timeout=180s")


def test_the_first_node_and_one_that_does_not_exist_are_refused(made: Cluster) -> None:
    for number in (1, 4):
        with pytest.raises(LocalClusterError, match=f"node {number}: cluster .* has 3 nodes"):
            made.fault(number, "off")


def test_nothing_of_the_nodes_is_left(host: Callable[[str], Any], busybox: Path) -> None:
    name = f"{NAME}-x"
    before = host(name)
    localcluster.up(name, nodes=2).load(str(busybox))
    assert host(name) != before
    cluster.down(name, purge=True)
    assert host(name) == before
