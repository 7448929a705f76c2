"""What an administrator offers to jobs: certificates, images, and volumes for scratch."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.aio.client.models import V1Job

from finetune_api.resource import FineTuneJob
from finetune_api.scalars import quantity_value
from finetune_api.status import Restarts
from finetune_operator.core.plan import plan
from finetune_operator.core.pods import manifests
from finetune_operator.core.pods.offers import NotOffered, check_offered, unlisted
from finetune_operator.settings import Settings, parse
from k8s_operator.support.observed_states import a_job


def _specs(settings: Settings, **sections: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the spec of a training pod and that of the preflight pod."""
    job = a_job(**sections)
    run = plan(job, settings)
    bodies = (manifests.attempt_job(job, run, settings, Restarts()), manifests.preflight_job(job, run, settings))
    for body in bodies:
        V1Job.model_validate(body)
    trainer, check = (body["spec"]["template"]["spec"] for body in bodies)
    return trainer, check


def test_every_pod_trusts_the_certificates_of_the_administrator() -> None:
    settings = parse("pods: {caBundle: {configMap: company-ca, key: bundle.pem}}")
    for spec in _specs(settings):
        (container,) = spec["containers"]
        source = {"name": "company-ca", "items": [{"key": "bundle.pem", "path": "ca.crt"}]}
        assert {"name": "ca-bundle", "configMap": source} in spec["volumes"]
        assert {"name": "ca-bundle", "mountPath": "/etc/finetune/ca", "readOnly": True} in container["volumeMounts"]
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert {env[name] for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")} == {
            "/etc/finetune/ca/ca.crt"
        }
    for spec in _specs(Settings()):
        assert "SSL_CERT_FILE" not in {entry["name"] for entry in spec["containers"][0]["env"]}


_ALLOWED = parse("pods: {allowedImages: [registry.test/trainers/, 'registry.test/own:1', 'registry.test/pinned@']}")


@pytest.mark.parametrize(
    ("image", "allowed"),
    [
        ("registry.test/trainers/a:2", True),
        ("registry.test/own:1", True),
        ("registry.test/pinned@sha256:" + "0" * 64, True),
        ("registry.test/own:12", False),
        ("registry.test/trainers", False),
        ("registry.test/pinned:1", False),
        ("evil.test/registry.test/trainers/a", False),
    ],
)
def test_a_job_may_name_only_images_that_are_allowed(image: str, allowed: bool) -> None:
    job = a_job(pod={"image": image})
    if not allowed:
        with pytest.raises(NotOffered, match=r"spec\.pod\.image: .*: registry\.test/trainers/, ") as refusal:
            check_offered(job, _ALLOWED)
        assert refusal.value.reason == "ImageNotAllowed"
        return
    check_offered(job, _ALLOWED)
    for spec in _specs(_ALLOWED, pod={"image": image}):
        assert spec["containers"][0]["image"] == image
    assert plan(job, _ALLOWED).provenance.image == image


def test_scratch_can_be_a_volume_of_a_storage_class() -> None:
    resources = {"scratch": "500Gi", "scratchStorageClass": "local-nvme"}
    trainer, check = _specs(Settings(), resources=resources)
    scratch = next(volume for volume in trainer["volumes"] if volume["name"] == "scratch")
    claim = scratch["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim["storageClassName"] == "local-nvme"
    assert claim["resources"]["requests"]["storage"] == "500Gi"
    limits = trainer["containers"][0]["resources"]["limits"]
    assert quantity_value(limits["ephemeral-storage"]) == 3 * 2**30
    assert "emptyDir" in next(volume for volume in check["volumes"] if volume["name"] == "scratch")


def test_the_model_cache_is_a_claim_of_training_pods() -> None:
    settings = parse("models: {cache: {claim: models, size: 2Gi}}")
    trainer, check = _specs(settings)
    assert {"name": "model-cache", "persistentVolumeClaim": {"claimName": "models"}} in trainer["volumes"]
    assert {"name": "model-cache", "mountPath": "/mnt/model-cache"} in trainer["containers"][0]["volumeMounts"]
    assert "model-cache" not in {volume["name"] for volume in check["volumes"]}
    cache = plan(a_job(), settings).model_cache
    assert cache is not None
    assert (cache.root, cache.max_bytes) == ("/mnt/model-cache", 2 * 2**30)
    assert plan(a_job(), Settings()).model_cache is None


_KEYS = {"key": "x.test/a"}
# What nobody offers, and what a job that waits for it can do instead.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an image": ({"pod": {"image": "evil.test/a:1"}}, "change pod.image of this job"),
    "a network": ({"pod": {"network": "infiniband"}}, "change pod.network of this job"),
    "a toleration": ({"pod": {"tolerations": [{**_KEYS, "operator": "Exists"}]}}, "change pod.tolerations of this job"),
    "a label of nodes": ({"pod": {"nodeSelector": {"x.test/a": "b"}}}, "change pod.nodeSelector of this job"),
    "a priority": ({"pod": {"priorityClassName": "high"}}, "change pod.priorityClassName of this job"),
    "a protection": (
        {"pod": {"annotations": {"seccomp.security.alpha.kubernetes.io/pod": "unconfined"}}},
        "change pod.annotations of this job"),
    "a Secret": ({"output": {"credentialsRef": {"name": "other"}}}, "change output.credentialsRef of this job"),
    "a Secret of what the job starts from": (
        {"model": {"checkpoint": {"uri": "s3://models/first", "credentialsRef": {"name": "other"}}}},
        "create a job without it"),
    "a GPU": ({"resources": {"gpu": {"name": "nvidia.com/x"}}}, "change resources.gpu.name of this job"),
    "a queue": ({"run_policy": {"queueName": "other"}}, "set runPolicy.suspend to true, and then change"),
    "a driver": (
        {"pod": {"volumes": [{"name": "v", "csi": {"driver": "evil.test"}}]}}, "create a job without this volume"),
    "an account": ({"pod": {"serviceAccountName": "other"}}, "change pod.serviceAccountName of this job"),
    "a claim": ({"dataset": {"uri": "pvc://other/rows"}}, "create a job without it"),
}  # fmt: skip


@pytest.mark.parametrize(("sections", "advice"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_offered_says_what_this_job_may_change(sections: dict[str, Any], advice: str) -> None:
    tenants = "tenants: {secrets: [s3], gpus: [nvidia.com/gpu], queues: [team], claims: [team]}"
    with pytest.raises(NotOffered) as refusal:
        _offer(a_job(**sections), parse(tenants))
    assert advice in str(refusal.value)


def _offer(job: FineTuneJob, settings: Settings) -> None:
    """Raise NotOffered as the operator does in a namespace without labeled objects."""
    check_offered(job, settings)
    for entry in unlisted(job, settings):
        if refusal := entry.refusal(None):
            raise refusal
