"""One cluster for all end-to-end tests: the operator by Helm, a tiny model and tiny data in a real S3 server.

`FINETUNE_E2E_CLUSTER=name` uses a cluster that is up and keeps it; otherwise one is made, and removed at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from demo import clusters, install
from e2e.world import NAMESPACE, World
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
    place = clusters.place(running) if running else clusters.up(CLUSTER)
    try:
        clusters.load(place.name, operator_image, trainer_image)
        start_afresh(place)
        install.namespace(place, NAMESPACE)
        install.operator(place, operator_image, trainer_image, "pods.gracePeriodSeconds=40")
        scratch = tmp_path_factory.mktemp("assets")
        tiny_llama(scratch / "tiny-llama", seed=1)
        install.put_folder(install.s3_store(place, "models"), scratch / "tiny-llama", "tiny-llama")
        put_rows(place)
        yield World(place=place, operator_image=operator_image, trainer_image=trainer_image)
    finally:
        if not running:
            clusters.remove(CLUSTER)


def start_afresh(place: clusters.Place) -> None:
    """Nothing of an earlier run on the same cluster."""
    place.kubectl_run("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")
    store = install.s3_store(place, "outputs")
    old = [meta["path"] for batch in obstore.list(store) for meta in batch]
    if old:
        obstore.delete(store, old)


def put_rows(place: clusters.Place) -> None:
    """200 rows to learn, 20 to test on, and a broken file."""
    store = install.s3_store(place, "data")
    words = [f"word{i}" for i in range(220)]
    rows = [json.dumps({"prompt": f"Say {w}: ", "completion": f"{w} is said"}) for w in words]
    obstore.put(store, "tiny/train.jsonl", "\n".join(rows[:200]).encode())
    obstore.put(store, "tiny/test.jsonl", "\n".join(rows[200:]).encode())
    obstore.put(store, "tiny/broken.jsonl", "\n".join([*rows[:6], '{"prompt": "half a ro', *rows[7:20]]).encode())
