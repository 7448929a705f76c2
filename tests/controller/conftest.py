"""A world and an operator of its own for each test: namespaces are cheap, and so nobody disturbs anybody."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.operator_process import Operator
from controller.world import NODE, World

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def node(crd: Any) -> None:
    """A Node object that nobody runs: the tests bind pods to it and play its kubelet."""
    world = World(crd.kubeconfig, "default")
    answer = world.request("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
    assert answer.accepted or answer.code == 409, answer.message


@pytest.fixture
def world(crd: Any, node: None) -> Iterator[World]:
    """An empty namespace with its service account; deleted at the end."""
    name = f"world-{os.getpid()}-{next(_numbers)}"
    there = World(crd.kubeconfig, name)
    answer = there.request(
        "POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    )
    assert answer.accepted, answer.message
    there.wait(lambda: there.get("serviceaccounts", "default"))
    yield there
    there.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture
def operators(crd: Any, world: World, tmp_path: Path) -> Iterator[Callable[..., Operator]]:
    """Makes replicas; all are ended at the end, and none may have ended by itself."""
    made: list[Operator] = []

    def make(**settings: Any) -> Operator:
        made.append(Operator(crd.kubeconfig, tmp_path, (world.namespace,), **settings))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
def operator(operators: Callable[..., Operator]) -> Operator:
    """One that runs."""
    one = operators()
    one.start()
    return one
