"""An operator whose CRD has another version, as in an upgrade, a downgrade or a rollback: whatever
a job is doing, it doesn't fail, its pods remain its own, and it continues as soon as it can."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from finetune_api import names
from finetune_api.status import Restarts
from finetune_operator.controller import reconcile, spec_reader
from finetune_operator.controller.reconcile import Reconciler
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.workqueue import WorkQueue
from finetune_operator.kube.client import NotFound
from finetune_operator.settings import Settings
from k8s_operator.support.kubelet_stand_in import job_body

_KEY = ("team", "modern")
_SCHEMA = {
    "x-kubernetes-group-version-kind": [{"group": names.GROUP, "version": names.VERSION, "kind": names.KIND}],
    "properties": {
        "spec": {
            "properties": {
                "training": {"properties": {"sharpness": {"type": "number", "default": 0}}},
                "pod": {"properties": {"env": {"items": {"properties": {"scope": {"default": "all"}}}}}},
                "audit": {"type": "object", "default": {"level": "none"}},
                "teacher": {"type": "object"},
            }
        }
    },
}


class _Cluster:
    """A client of an API server that stores one job and its Jobs, and publishes a newer schema."""

    def __init__(self, body: dict[str, Any], *jobs: dict[str, Any]) -> None:
        self.body = body
        self.jobs = list(jobs)
        self.created: list[str] = []
        self.schema: dict[str, Any] = _SCHEMA
        self.reads = 0

    async def schemas(self, api_version: str) -> dict[str, Any]:
        self.reads += 1
        return {"io.finetune": self.schema}

    async def get(self, resource: str, namespace: str, name: str) -> dict[str, Any]:
        if resource == names.PLURAL:
            return self.body
        raise NotFound(404, "NotFound", name)

    async def matching(self, resource: str, namespace: str, matches: Any) -> list[dict[str, Any]]:
        return [job for job in self.jobs if matches(job)] if resource == "jobs" else []

    async def items(self, *_: Any, **__: Any) -> AsyncIterator[dict[str, Any]]:
        for event in ():
            yield event

    async def create(self, resource: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        meta = {**manifest["metadata"], "uid": manifest["metadata"].get("name", ""), "resourceVersion": "20"}
        if resource == "jobs":
            self.created.append(meta["name"])
        return {**manifest, "metadata": meta}

    async def apply_status(self, namespace: str, name: str, version: str, status: dict[str, Any]) -> dict[str, Any]:
        meta = {**self.body["metadata"], "resourceVersion": str(int(version) + 1)}
        self.body = {**self.body, "metadata": meta, "status": status}
        return self.body

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.body["status"]
        return status

    def condition(self, kind: str) -> tuple[str, str]:
        return next((c["status"], c["reason"]) for c in self.status["conditions"] if c["type"] == kind)


class _Silent:
    """A recorder that records nothing."""

    async def record(self, *_: Any) -> None:
        return None

    def forget(self, uid: str) -> None:
        return None


def _body(status: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    body = job_body("modern")
    body["metadata"] |= {"namespace": "team", "uid": "u1", "resourceVersion": "7", "generation": 1}
    body["spec"] = _merged(body["spec"], change)
    return {**body, "status": status}


def _merged(spec: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(spec)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _job(number: int, **status: Any) -> dict[str, Any]:
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "modern", "uid": "u1", "controller": True}
    return {
        "metadata": {
            "namespace": "team", "name": f"modern-{number}", "uid": f"job-{number}", "resourceVersion": "3",
            "creationTimestamp": "2026-01-01T00:00:00Z", "ownerReferences": [owner],
        },
        "spec": {"completions": 1},
        "status": status,
    }  # fmt: skip


_FAILED_JOB = {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": "2026-01-01T00:01:00Z"}]}
_SUSPENDED = [
    {"type": "Suspended", "status": "True", "reason": "Suspended", "lastTransitionTime": "2026-01-01T00:00:00Z"}
]
_RUNNING = {"phase": "Running", "attempt": 1, "observedGeneration": 1}

# A job in the middle of its life: its status, its Jobs, and whether it now needs new pods.
LIVES: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...], bool]] = {
    "new": ({}, (), True),
    "running": (_RUNNING, (_job(1),), False),
    "suspended, and now resumed": ({"phase": "Suspended", "attempt": 1, "conditions": _SUSPENDED}, (), True),
    "waiting for its next attempt": (_RUNNING, (_job(1, **_FAILED_JOB),), True),
    "failed": ({"phase": "Failed", "attempt": 1, "failure": {"reason": "DiskFull"}}, (_job(1, **_FAILED_JOB),), False),
    "succeeded": ({"phase": "Succeeded", "attempt": 1}, (), False),
}
# What the newer CRD has in the spec, and whether this version can ignore it.
FIELDS: dict[str, tuple[dict[str, Any], bool]] = {
    "a field at its default": ({"training": {"sharpness": 0}}, True),
    "a section at its default": ({"audit": {"level": "none"}}, True),
    "a field in a list": ({"pod": {"env": [{"name": "NCCL_DEBUG", "value": "INFO", "scope": "all"}]}}, True),
    "a field with another value": ({"training": {"sharpness": 0.1}}, False),
    "a field without a default": ({"teacher": {"uri": "s3://models/teacher"}}, False),
    "an unknown choice": ({"method": {"type": "grpo"}}, False),
    "a value of another type": ({"training": {"epochs": "many"}}, False),
}


async def _reconciled(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> ControllerState:
    monkeypatch.setattr(reconcile, "_UPGRADE_SECONDS", 0.0)
    state = ControllerState(WorkQueue())
    state.cache.put_body(cluster.body)
    for job in cluster.jobs:
        state.cache.put_job(job)
    settings = Settings.model_validate({"trainerImage": "example.test/trainer:1"})
    await Reconciler(cluster, state, settings, _Silent()).reconcile(_KEY)  # type: ignore[arg-type]
    return state


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("field", FIELDS)
async def test_no_version_of_the_crd_fails_a_job_or_abandons_its_pods(
    life: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, jobs, needs_pods = LIVES[life]
    change, is_ignored = FIELDS[field]
    cluster = _Cluster(_body(status, change), *jobs)
    await _reconciled(cluster, monkeypatch)
    assert bool(cluster.created) is (is_ignored and needs_pods)
    assert cluster.status.get("phase", "Pending") == "Failed" if life == "failed" else True
    if life not in ("failed", "succeeded"):
        assert cluster.status.get("phase") not in ("Failed", "Succeeded")
        assert cluster.status.get("restarts", {}).get("infrastructure", 0) <= 1
    if needs_pods and not is_ignored:
        assert cluster.condition("Stalled")[0] == "True"
        assert cluster.condition("Failed")[0] == "False"
        assert next(iter(change)) in cluster.status["message"]


@pytest.mark.parametrize("life", [life for life, (_, _, needs_pods) in LIVES.items() if needs_pods])
async def test_the_operator_that_knows_the_field_continues_where_the_other_one_stalled(
    life: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, jobs, _ = LIVES[life]
    cluster = _Cluster(_body(status, {"teacher": {}}), *jobs)
    await _reconciled(cluster, monkeypatch)
    assert cluster.created == []
    del cluster.body["spec"]["teacher"]  # as good as known
    await _reconciled(cluster, monkeypatch)
    assert len(cluster.created) == 1
    assert cluster.condition("Stalled") == ("False", "Healthy")
    infrastructure = 1 if life == "waiting for its next attempt" else 0
    assert Restarts.model_validate(cluster.status["restarts"]) == Restarts(infrastructure=infrastructure)


async def test_a_schema_that_is_published_late_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_UPGRADE_SECONDS", 0.0)
    monkeypatch.setattr(spec_reader, "_RETRY_SECONDS", 0.0)
    cluster = _Cluster(_body({}, {"training": {"sharpness": 0}}))
    cluster.schema = {}
    state = ControllerState(WorkQueue())
    state.cache.put_body(cluster.body)
    settings = Settings.model_validate({"trainerImage": "example.test/trainer:1"})
    reconciler = Reconciler(cluster, state, settings, _Silent())  # type: ignore[arg-type]
    await reconciler.reconcile(_KEY)
    assert cluster.created == []
    assert cluster.condition("Stalled")[0] == "True"
    cluster.schema = _SCHEMA
    await reconciler.reconcile(_KEY)
    assert cluster.created == ["modern-1"]


async def test_a_stalled_job_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _Cluster(_body({}, {"teacher": {}}))
    await _reconciled(cluster, monkeypatch)
    version = cluster.body["metadata"]["resourceVersion"]
    await _reconciled(cluster, monkeypatch)
    assert cluster.body["metadata"]["resourceVersion"] == version


async def test_nothing_is_reported_in_the_first_minute_of_an_upgrade() -> None:
    cluster = _Cluster(_body({}, {"teacher": {}}))
    state = ControllerState(WorkQueue())
    state.cache.put_body(cluster.body)
    settings = Settings.model_validate({"trainerImage": "example.test/trainer:1"})
    await Reconciler(cluster, state, settings, _Silent()).reconcile(_KEY)  # type: ignore[arg-type]
    assert (cluster.status, cluster.created) == ({}, [])


async def test_the_schema_is_read_only_for_jobs_with_unknown_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _Cluster(_body({}, {}))
    await _reconciled(cluster, monkeypatch)
    assert cluster.reads == 0
