"""One cluster for all end-to-end tests: the operator is installed by Helm, and a tiny model and
small data are in a real S3 server.

`FINETUNE_E2E_CLUSTER=name` uses a running cluster and keeps it; otherwise one is created, and
removed at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from demo import clusters, install
from e2e.support.jobs import NAMESPACE, World
from testkit.tiny_models import tiny_llama

CLUSTER = "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    running = os.environ.get("FINETUNE_E2E_CLUSTER")
    operator_image, trainer_image = clusters.build_images()
    cluster = clusters.access(running) if running else clusters.up(CLUSTER, "--nodes", "2")
    try:
        clusters.load(cluster.name, operator_image, trainer_image)
        start_afresh(cluster)
        install.namespace(cluster, NAMESPACE)
        install.operator(cluster, operator_image, trainer_image, "pods.gracePeriodSeconds=40")
        scratch = tmp_path_factory.mktemp("assets")
        tiny_llama(scratch / "tiny-llama", seed=1)
        install.put_folder(install.s3_store(cluster, "models"), scratch / "tiny-llama", "tiny-llama")
        put_rows(cluster)
        yield World(cluster=cluster, operator_image=operator_image, trainer_image=trainer_image)
    finally:
        if not running:
            clusters.remove(CLUSTER)


def start_afresh(cluster: clusters.ClusterAccess) -> None:
    """Delete everything of an earlier run on the same cluster."""
    cluster.kubectl_run("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")
    store = install.s3_store(cluster, "outputs")
    old = [meta["path"] for batch in obstore.list(store) for meta in batch]
    if old:
        obstore.delete(store, old)


def put_rows(cluster: clusters.ClusterAccess) -> None:
    """Upload 200 rows to train on, 20 to test on, and a broken file."""
    store = install.s3_store(cluster, "data")
    subjects = [f"word{i}" for i in range(220)]
    rows = [json.dumps({"prompt": f"Say {w}: ", "completion": f"{w} is said"}) for w in subjects]
    obstore.put(store, "tiny/train.jsonl", "\n".join(rows[:200]).encode())
    obstore.put(store, "tiny/test.jsonl", "\n".join(rows[200:]).encode())
    obstore.put(store, "tiny/broken.jsonl", "\n".join([*rows[:6], '{"prompt": "half a ro', *rows[7:20]]).encode())
