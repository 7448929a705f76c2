"""A CRD that is newer than the operator, on a real API server: jobs with its defaults run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_api import names
from finetune_api.crd.schema import custom_resource_definition
from k8s_operator.support.kubelet_stand_in import World
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster

_PATH = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{names.PLURAL}.{names.GROUP}"


@pytest.fixture
def newer_crd(world: World) -> Iterator[None]:
    """The CRD with one more field, which has a default, and one more section, which has none."""
    ours = custom_resource_definition()
    newer = copy.deepcopy(ours)
    spec = newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    spec["training"]["properties"]["sharpness"] = {"type": "number", "default": 0}
    spec["training"]["default"]["sharpness"] = 0
    spec["teacher"] = {"type": "object", "properties": {"uri": {"type": "string"}}}
    _install(world, newer)
    yield
    _install(world, ours)


def _install(world: World, crd: dict[str, Any]) -> None:
    answer = world.request("PATCH", _PATH, {"spec": crd["spec"]}, "application/merge-patch+json")
    assert answer.accepted, answer.message


def _published(world: World) -> bool:
    document = world.request("GET", f"/openapi/v3/apis/{names.API_VERSION}").body
    return any("sharpness" in str(schema) for schema in document["components"]["schemas"].values())


def test_a_job_with_defaults_of_a_newer_crd_runs_and_one_with_other_values_waits(
    world: World, operators: Callable[..., Operator], newer_crd: None
) -> None:
    world.wait(lambda: _published(world), 30)
    world.submit("other", teacher={"uri": "s3://models/teacher"})
    body = world.submit("default")
    assert body["spec"]["training"]["sharpness"] == 0
    operator = operators()
    operator.start()
    world.run_pods("default-1")
    world.wait_phase("default", "Running", 20)
    assert world.get("jobs", "other-1") is None
    assert world.status("other").get("phase") != "Failed"
    assert any("spec.training.sharpness" in str(line) for line in operator.log_lines())
