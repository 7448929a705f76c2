"""Volumes that a job names: what training and preflight pods have of them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.aio.client.models import V1Job

from finetune_api import names
from finetune_api.status import Restarts
from finetune_operator.core.plan import plan
from finetune_operator.core.pods import manifests
from finetune_operator.core.pods.offers import NotOffered, check_offered
from finetune_operator.settings import Settings, parse
from k8s_operator.support.observed_states import a_job

_VOLUMES = [
    {"name": "base", "image": {"reference": "registry.test/llama:1", "pullPolicy": "Always"}},
    {
        "name": "rows",
        "csi": {"driver": "bucket.example.com", "attributes": {"bucket": "b"}, "secretRef": {"name": "s"}},
    },
    {"name": "work", "claim": {"name": "team", "readOnly": False}},
    {"name": "topology", "claim": {"name": "files"}},
]
_SOURCES = {
    "volume-base": {"image": {"reference": "registry.test/llama:1", "pullPolicy": "Always"}},
    "volume-rows": {
        "csi": {
            "driver": "bucket.example.com",
            "readOnly": True,
            "volumeAttributes": {"bucket": "b"},
            "nodePublishSecretRef": {"name": "s"},
        }
    },
    "volume-work": {"persistentVolumeClaim": {"claimName": "team"}},
    "volume-topology": {"persistentVolumeClaim": {"claimName": "files"}},
}
_URIS: dict[str, Any] = {
    "model": {"uri": "volume://base/model"},
    "dataset": {"uri": "volume://rows/train.jsonl"},
    "output": {"uri": "volume://work/result"},
}
_DRIVERS = parse("pods: {allowedCsiDrivers: [bucket.example.com, other.example.com]}")


def _volumes(role: str, **sections: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sources and the mounts of pod.volumes in a pod, by name."""
    job = a_job(**sections)
    run = plan(job, _DRIVERS)
    builder = {
        names.ROLE_TRAINER: lambda: manifests.attempt_job(job, run, _DRIVERS, Restarts()),
        names.ROLE_PREFLIGHT: lambda: manifests.preflight_job(job, run, _DRIVERS),
    }[role]
    body = builder()
    V1Job.model_validate(body)
    pod = body["spec"]["template"]["spec"]
    sources = {v["name"]: {k: s for k, s in v.items() if k != "name"} for v in pod["volumes"]}
    mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"]}
    return ({n: v for n, v in sources.items() if n in _SOURCES}, {n: m for n, m in mounts.items() if n in _SOURCES})


def test_a_training_pod_has_every_volume_and_can_write_only_to_claims_that_say_so() -> None:
    sources, mounts = _volumes(names.ROLE_TRAINER, **_URIS, pod={"volumes": _VOLUMES})
    assert sources == _SOURCES
    assert {name: mount["mountPath"] for name, mount in mounts.items()} == {
        name: f"/mnt/volumes/{name.removeprefix('volume-')}" for name in _SOURCES
    }
    assert [name for name, mount in mounts.items() if not mount.get("readOnly")] == ["volume-work"]


@pytest.mark.parametrize(
    ("sections", "present"),
    [
        pytest.param(_URIS, {"volume-base", "volume-rows", "volume-work"}, id="everything on volumes"),
        pytest.param({}, set(), id="nothing on volumes"),
        pytest.param(
            {"dataset": {"uri": "s3://data/a.jsonl", "test": {"uri": "volume://rows/t.jsonl"}}},
            {"volume-rows"},
            id="test",
        ),
        pytest.param(
            {"dataset": {"uri": "s3://data/a.jsonl", "validation": {"uri": "volume://rows/v.jsonl"}}},
            {"volume-rows"},
            id="validation",
        ),
        pytest.param(
            {"dataset": {"uri": None, "sources": [{"uri": "volume://rows/a.jsonl"}]}}, {"volume-rows"}, id="a mixture"
        ),
    ],
)
def test_a_check_has_the_volumes_that_a_uri_names(sections: dict[str, Any], present: set[str]) -> None:
    sources, mounts = _volumes(names.ROLE_PREFLIGHT, **sections, pod={"volumes": _VOLUMES})
    assert sources.keys() == mounts.keys() == present


def test_the_trainer_gets_the_path_of_a_volume_and_messages_name_what_the_user_wrote() -> None:
    run = plan(a_job(**_URIS, pod={"volumes": _VOLUMES}), _DRIVERS)
    assert run.model.location.uri == "file:///mnt/volumes/base/model"
    assert run.model.location.display == "volume://base/model"
    assert run.output.uri == "file:///mnt/volumes/work/result"


@pytest.mark.parametrize(
    ("settings", "existing"),
    [(Settings(), "there are none"), (parse("pods: {allowedCsiDrivers: [nfs.example.com]}"), "nfs.example.com")],
)
def test_a_driver_that_the_administrator_does_not_allow_is_refused_with_those_that_exist(
    settings: Settings, existing: str
) -> None:
    job = a_job(**_URIS, pod={"volumes": _VOLUMES})
    with pytest.raises(NotOffered, match=rf"spec\.pod\.volumes: 'bucket\.example\.com' .*: {existing}; ") as refusal:
        check_offered(job, settings)
    assert refusal.value.reason == "CsiDriverNotAllowed"
    check_offered(job, _DRIVERS)
    check_offered(a_job(pod={"volumes": [_VOLUMES[0], _VOLUMES[2]]}), settings)
