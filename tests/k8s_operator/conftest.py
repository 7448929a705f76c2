"""Each test gets its own namespace and its own operator: namespaces are cheap, and so no test
disturbs another."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k8s_operator.support.kubelet_stand_in import NODE, World
from k8s_operator.support.operator_process import Operator

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def node(crd: Any) -> None:
    """A Node object without a machine: the tests bind pods to it and play its kubelet."""
    world = World(crd.kubeconfig, "default")
    answer = world.request("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
    assert answer.accepted or answer.code == 409, answer.message


@pytest.fixture
def world(crd: Any, node: None) -> Iterator[World]:
    """An empty namespace with its service account, deleted after the test."""
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
    """Returns a function that makes replicas. All of them are killed after the test."""
    made: list[Operator] = []

    def make(**settings: Any) -> Operator:
        made.append(Operator(crd.kubeconfig, tmp_path, (world.namespace,), **settings))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
def operator(operators: Callable[..., Operator]) -> Operator:
    """A running operator with one replica."""
    one = operators()
    one.start()
    return one
