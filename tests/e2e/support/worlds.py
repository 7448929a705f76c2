"""Clusters for end-to-end tests: the operator is installed by Helm, and a tiny model and small data
are in a real S3 server. Jobs may connect to what they need, and to nothing else."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore

from demo import clusters, install
from demo.clusters import ClusterAccess
from e2e.support.jobs import NAMESPACE, World
from testkit.shared_clusters import shared

MONITORING = "monitoring"  # a namespace whose pods may read metrics


def shared_world(name: str, scratch: Path, *settings: str, nodes: int, network_policies: bool = False) -> World:
    """Returns the cluster of that name, which all processes of the tests share.

    `settings` are the chart's; `scratch` is an empty folder. If `network_policies`, the cluster's
    network enforces them.
    """

    def start() -> dict[str, Any]:
        images = clusters.build_images()
        options = ("--nodes", str(nodes), *(("--network-policies",) if network_policies else ()))
        return asdict(_prepared(clusters.up(name, *options), images, settings, scratch))

    description = shared(name, start)
    return World(**{**description, "cluster": ClusterAccess(**description["cluster"])})


def running_world(name: str, scratch: Path) -> World:
    """Returns a cluster that somebody has started, and that stays. Only one process may use it."""
    return _prepared(clusters.access(name), clusters.build_images(), (), scratch)


def _prepared(cluster: ClusterAccess, images: tuple[str, str], settings: tuple[str, ...], scratch: Path) -> World:
    from testkit.tiny_models import tiny_llama  # PyTorch, which only the process that starts the cluster needs

    clusters.load(cluster.name, *images)
    _start_afresh(cluster)
    install.namespace(cluster, NAMESPACE)
    install.operator(cluster, *images, "pods.gracePeriodSeconds=40", *_network(cluster), *settings)
    tiny_llama(scratch / "tiny-llama", seed=1)
    install.put_folder(install.s3_store(cluster, "models"), scratch / "tiny-llama", "tiny-llama")
    _put_rows(cluster)
    return World(cluster, *images)


def _network(cluster: ClusterAccess) -> tuple[str, ...]:
    """The chart's settings by which jobs reach DNS, object storage and the operator only, and which
    let Prometheus, whose address is a node's, and a namespace read metrics."""
    storage = urlsplit(cluster.s3_endpoint)
    nodes = ipaddress.ip_network(f"{storage.hostname}/24", strict=False)
    metrics, egress = "networkPolicy.metricsFrom", "networkPolicy.jobs.egress"
    return (
        f"{metrics}[0].ipBlock.cidr={nodes}",
        f"{metrics}[1].namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name={MONITORING}",
        f"{egress}[0].ports[0].port=53",
        f"{egress}[0].ports[0].protocol=UDP",
        f"{egress}[0].ports[1].port=53",
        f"{egress}[0].ports[1].protocol=TCP",
        f"{egress}[1].to[0].ipBlock.cidr={storage.hostname}/32",
        f"{egress}[1].ports[0].port={storage.port}",
    )


def _start_afresh(cluster: ClusterAccess) -> None:
    """Deletes everything of an earlier run on the same cluster."""
    cluster.kubectl_run("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")
    store = install.s3_store(cluster, "outputs")
    old = [meta["path"] for batch in obstore.list(store) for meta in batch]
    if old:
        obstore.delete(store, old)


def _put_rows(cluster: ClusterAccess) -> None:
    """Uploads 200 rows to train on, 20 to test on, and a broken file."""
    store = install.s3_store(cluster, "data")
    subjects = [f"word{i}" for i in range(220)]
    rows = [json.dumps({"prompt": f"Say {w}: ", "completion": f"{w} is said"}) for w in subjects]
    obstore.put(store, "tiny/train.jsonl", "\n".join(rows[:200]).encode())
    obstore.put(store, "tiny/test.jsonl", "\n".join(rows[200:]).encode())
    obstore.put(store, "tiny/broken.jsonl", "\n".join([*rows[:6], '{"prompt": "half a ro', *rows[7:20]]).encode())
