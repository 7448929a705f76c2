"""One cluster for all end-to-end tests of this folder.

Its network enforces NetworkPolicies. `FINETUNE_E2E_CLUSTER=name` uses a running cluster, started by
`up --network-policies`, and keeps it; otherwise one is created, and removed at the end.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from e2e.support.jobs import World
from e2e.support.worlds import running_world, shared_world


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    scratch = tmp_path_factory.mktemp("assets")
    if name := os.environ.get("FINETUNE_E2E_CLUSTER"):
        return running_world(name, scratch)
    return shared_world("e2e", scratch, nodes=2, network_policies=True)
