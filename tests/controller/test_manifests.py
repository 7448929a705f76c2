"""What is created for a job: decided by plan, written by manifests and pod; read by the real client's strict models."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.aio.client.models import V1Job, V1Service

from controller.builders import a_job
from finetune_api import names
from finetune_api.reasons import REASONS
from finetune_api.run import RunConfig, parse
from finetune_api.status import Restarts
from finetune_operator import manifests
from finetune_operator.plan import plan, spec_digest, wants_preflight
from finetune_operator.settings import Settings
from finetune_operator.settings import parse as parse_settings

_SETTINGS = parse_settings("""
trainerImage: registry.test/trainer@sha256:abc
progress: {url: "http://operator.finetune:8443/"}
storage: {s3: {endpoint: "http://s3.test:9000", allowHttp: true}, hub: {endpoint: "http://hub.test"}}
pods:
  gracePeriodSeconds: 90
  tolerations: [{key: gpu, operator: Exists}]
  nodeSelector: {pool: gpu}
  runtimeClassName: nvidia
""")
_FULL: dict[str, Any] = {"method": {"type": "full", "lora": None}}


def _job(**sections: Any) -> dict[str, Any]:
    job = a_job(**sections)
    return manifests.attempt_job(job, plan(job, _SETTINGS), _SETTINGS, Restarts(infrastructure=1))


def _pod(**sections: Any) -> dict[str, Any]:
    spec: dict[str, Any] = _job(**sections)["spec"]["template"]["spec"]
    return spec


def test_every_manifest_is_what_the_client_knows_without_a_misspelt_field() -> None:
    job = a_job(distribution={"nodes": 2, "processesPerNode": 4}, resources={"gpu": {}})
    run = plan(job, _SETTINGS)
    V1Job.model_validate(manifests.attempt_job(job, run, _SETTINGS, Restarts()))
    V1Job.model_validate(manifests.preflight_job(job, run, _SETTINGS))
    V1Service.model_validate(manifests.service(job))


def test_a_pod_meets_pod_security_restricted() -> None:
    pod = _pod()
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()


def test_environment_comes_from_a_fixed_list() -> None:
    (container,) = _pod()["containers"]
    assert [entry["name"] for entry in container["env"]] == [
        "POD_NAME", "FINETUNE_RUN_CONFIG", "FINETUNE_TERMINATION_LOG", "HOME", "HF_ENDPOINT",
    ]  # fmt: skip
    assert "envFrom" not in container


def test_gpus_are_asked_for_by_the_trainer_and_never_by_the_check() -> None:
    job = a_job(distribution={"processesPerNode": 4}, resources={"gpu": {"name": "amd.com/gpu"}, "cpu": "32"})
    run = plan(job, _SETTINGS)
    trainer = manifests.attempt_job(job, run, _SETTINGS, Restarts())["spec"]["template"]["spec"]["containers"][0]
    check = manifests.preflight_job(job, run, _SETTINGS)["spec"]["template"]["spec"]["containers"][0]
    assert trainer["resources"]["requests"] == trainer["resources"]["limits"]
    assert trainer["resources"]["limits"]["amd.com/gpu"] == "4"
    assert "amd.com/gpu" not in check["resources"]["limits"]
    assert check["args"] == ["preflight"]


def test_a_check_is_not_repeated_for_what_only_a_person_can_mend() -> None:
    job = a_job(resources={"gpu": {}})
    spec = manifests.preflight_job(job, plan(job, _SETTINGS), _SETTINGS)["spec"]
    codes = set(spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"])
    assert codes == {r.exit_code for r in REASONS.values() if r.cause == "user" and r.exit_code}
    assert not codes & {r.exit_code for r in REASONS.values() if r.cause != "user"}


def test_only_several_pods_need_names() -> None:
    assert "subdomain" not in _pod()
    assert _pod(distribution={"nodes": 2})["subdomain"] == "train"


def test_settings_and_job_both_place_the_pods() -> None:
    pod = _pod(
        pod={"nodeSelector": {"zone": "a", "pool": "mine"}, "tolerations": [{"key": "spot", "operator": "Exists"}]}
    )
    assert pod["nodeSelector"] == {"pool": "mine", "zone": "a"}
    assert [t["key"] for t in pod["tolerations"]] == ["gpu", "spot"]
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["terminationGracePeriodSeconds"] == 90


def test_secrets_are_files_and_each_has_its_own_folder() -> None:
    pod = _pod(
        model={"credentialsRef": {"name": "hf"}},
        dataset={"credentialsRef": {"name": "reader"}},
        output={"credentialsRef": {"name": "writer"}},
    )
    volumes = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert volumes == {"credentials-model": "hf", "credentials-dataset": "reader", "credentials-output": "writer"}
    mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["credentials-output"]["mountPath"] == "/etc/finetune/credentials/output"
    assert all(mounts[name]["readOnly"] for name in volumes)


def test_a_claim_is_mounted_once_and_writable_only_for_the_output() -> None:
    pod = _pod(
        model={"uri": "pvc://models/base"},
        dataset={"uri": "pvc://work/data/train.jsonl"},
        output={"uri": "pvc://work/result"},
    )
    claims = {
        v["persistentVolumeClaim"]["claimName"]: v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v
    }
    mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"]}
    assert claims.keys() == {"models", "work"}
    assert mounts[claims["models"]] == {"name": claims["models"], "mountPath": "/mnt/pvc/models", "readOnly": True}
    assert "readOnly" not in mounts[claims["work"]]


def test_our_labels_and_the_run_configuration_cannot_be_replaced() -> None:
    template = _job(pod={"labels": {"team": "nlp"}, "annotations": {"note": "x"}})["spec"]["template"]["metadata"]
    assert template["labels"]["team"] == "nlp"
    assert template["labels"][names.LABEL_JOB_UID] == "job-uid"
    assert template["labels"]["app.kubernetes.io/part-of"] == "finetune-operator"
    run = parse(template["annotations"][names.ANNOTATION_RUN_CONFIG])
    assert run.job.uid == "job-uid"


def test_a_group_fails_together_and_is_never_mended_pod_by_pod() -> None:
    job = _job(distribution={"nodes": 3})
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    assert job["metadata"]["ownerReferences"][0]["controller"] is True


def _run(**sections: Any) -> RunConfig:
    return plan(a_job(**sections), _SETTINGS)


def test_places_are_as_the_pod_sees_them_and_messages_as_the_user_wrote_them() -> None:
    run = _run(model={"uri": "pvc://models/base/"}, dataset={"test": {"uri": "s3://data/test.jsonl"}})
    assert run.model.location.uri == "file:///mnt/pvc/models/base/"
    assert run.model.location.display == "pvc://models/base/"
    assert run.data.test is not None
    assert run.data.test.uri == "s3://data/test.jsonl"
    assert run.s3.endpoint == "http://s3.test:9000"
    assert run.progress is not None
    assert run.progress.url == "http://operator.finetune:8443/v1/progress"


@pytest.mark.parametrize(
    ("distribution", "chosen"),
    [({}, ("auto", "none")), ({"strategy": "zero3", "offload": "optimizer"}, ("zero3", "optimizer"))],
    ids=["auto, by whoever sees the memory", "as asked"],
)
def test_what_is_split_is_decided_where_the_hardware_is(distribution: dict[str, Any], chosen: tuple[str, str]) -> None:
    world = _run(distribution=distribution).world
    assert (world.strategy, world.offload) == chosen


@pytest.mark.parametrize(("cpu", "processes", "threads"), [("8", 2, 4), ("900m", 2, 1), ("3", 2, 1), ("16", 1, 16)])
def test_a_process_gets_its_share_of_the_cores(cpu: str, processes: int, threads: int) -> None:
    run = _run(resources={"cpu": cpu}, distribution={"processesPerNode": processes})
    assert run.world.threads_per_process == threads


def test_inputs_are_checked_beforehand_where_gpus_would_wait_for_it() -> None:
    gpu = {"gpu": {}}
    assert not wants_preflight(a_job().spec)
    assert wants_preflight(a_job(resources=gpu).spec)
    assert not wants_preflight(a_job(resources=gpu, run_policy={"preflight": "never"}).spec)
    assert wants_preflight(a_job(run_policy={"preflight": "always"}).spec)


def test_the_specs_digest_is_about_what_is_trained() -> None:
    assert spec_digest(a_job().spec) == spec_digest(a_job(run_policy={"suspend": True}).spec)
    assert spec_digest(a_job().spec) != spec_digest(a_job(training={"seed": 7}).spec)


def test_plan_is_the_same_whatever_the_attempt_but_for_its_number() -> None:
    job = a_job(distribution={"nodes": 2})
    first, second = plan(job, Settings(), 1), plan(job, Settings(), 2)
    assert second.world.master_address == "train-2-0.train"
    again = second.model_copy(update={"job": first.job, "world": first.world})
    assert again == first


def test_the_service_names_the_pod_of_node_rank_0_alone() -> None:
    selector = manifests.service(a_job())["spec"]["selector"]
    assert selector["batch.kubernetes.io/job-completion-index"] == "0"
    assert selector[names.LABEL_JOB_UID] == "job-uid"
