"""What cpu, memory and scratch of auto mean, and what a pod of the preflight check takes."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.scalars import quantity_value
from finetune_api.status import Restarts
from finetune_operator.core.plan import plan
from finetune_operator.core.pods import manifests
from finetune_operator.settings import Settings, parse
from k8s_operator.support.observed_states import a_job

_GIB = 2**30


def _limits(settings: Settings | None = None, model_bytes: int | None = None, **sections: Any) -> dict[str, Any]:
    settings = settings or Settings()
    job = a_job(**sections)
    manifest = manifests.attempt_job(job, plan(job, settings, 1, model_bytes), settings, Restarts())
    resources: dict[str, Any] = manifest["spec"]["template"]["spec"]["containers"][0]["resources"]
    return resources


@pytest.mark.parametrize(
    ("gpus", "cpu", "memory"),
    [(0, "4", 16), (1, "8", 24), (8, "64", 192)],
    ids=["none", "one GPU", "eight GPUs"],
)
def test_cores_memory_and_disk_follow_from_the_gpus(gpus: int, cpu: str, memory: int) -> None:
    sections = {"resources": {"gpu": {}}, "distribution": {"processesPerNode": gpus}} if gpus else {}
    limits = _limits(**sections)["limits"]
    assert limits["cpu"] == cpu
    assert quantity_value(limits["memory"]) == memory * _GIB
    scratch = quantity_value(limits["ephemeral-storage"]) - 3 * _GIB  # /tmp and the log
    assert scratch == (20 if gpus == 0 else 40 + 20 * gpus) * _GIB


def test_an_amount_that_is_set_is_never_changed() -> None:
    limits = _limits(model_bytes=500 * _GIB, resources={"gpu": {}, "cpu": 2, "memory": "7Gi", "scratch": "9Gi"})
    assert limits["limits"]["cpu"] == "2"
    assert limits["limits"]["memory"] == "7Gi"
    assert quantity_value(limits["limits"]["ephemeral-storage"]) == 12 * _GIB


@pytest.mark.parametrize(
    ("sections", "scratch"),
    [
        ({}, 140 + 20),
        ({"output": {"merge": True}}, 280 + 20),
        ({"method": {"type": "full", "lora": None}}, 140 + 24 * 140 + 20),
        ({"method": {"type": "full", "lora": None}, "distribution": {"nodes": 4}}, 140 + 6 * 140 + 20),
    ],
    ids=["an adapter", "a merged model too", "checkpoints of a whole model", "shards of them on four nodes"],
)
def test_disk_and_memory_grow_with_a_model_whose_size_the_check_has_read(
    sections: dict[str, Any], scratch: int
) -> None:
    limits = _limits(model_bytes=140 * _GIB, resources={"gpu": {}}, **sections)["limits"]
    assert quantity_value(limits["memory"]) == (140 + 8) * _GIB
    assert quantity_value(limits["ephemeral-storage"]) == (scratch + 3) * _GIB


def test_an_administrator_can_leave_out_the_limit_on_cores() -> None:
    resources = _limits(parse("pods: {cpuLimit: false}"), resources={"gpu": {}})
    assert resources["requests"]["cpu"] == "8"
    assert "cpu" not in resources["limits"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


@pytest.mark.parametrize(
    ("pods", "tolerations", "runtime_class"),
    [
        ("{tolerations: [{key: a, operator: Exists}], runtimeClassName: nvidia}", ["a"], None),
        (
            "{preflightTolerations: [{key: cpu, operator: Exists}], tolerations: [{key: a, operator: Exists}]}",
            ["cpu"],
            None,
        ),
        ("{preflightRuntimeClassName: gvisor}", [], "gvisor"),
    ],
    ids=["those of the chart", "its own", "its own runtime"],
)
def test_a_check_never_tolerates_the_taints_of_gpu_nodes_for_its_job(
    pods: str, tolerations: list[str], runtime_class: str | None
) -> None:
    settings = parse(f"pods: {pods}")
    job = a_job(resources={"gpu": {}}, pod={"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]})
    spec = manifests.preflight_job(job, plan(job, settings), settings)["spec"]["template"]["spec"]
    assert [entry["key"] for entry in spec.get("tolerations", [])] == tolerations
    assert spec.get("runtimeClassName") == runtime_class
