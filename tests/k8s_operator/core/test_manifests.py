"""The objects that are created for a job: `plan` decides them, `manifests` and `pod` build them,
and the real client's strict models parse them."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.aio.client.models import V1Job, V1Service

from finetune_api import names
from finetune_api.messages.run import RunConfig, parse
from finetune_api.reasons import REASONS
from finetune_api.resource import EnvVarSpec
from finetune_api.scalars import quantity_value
from finetune_api.status import Restarts
from finetune_operator.core.parsing import child_job
from finetune_operator.core.plan import needs_preflight, plan, spec_digest
from finetune_operator.core.pods import manifests
from finetune_operator.settings import Settings
from finetune_operator.settings import parse as parse_settings
from k8s_operator.support.observed_states import a_job

_SETTINGS = parse_settings("""
trainerImage: registry.test/trainer@sha256:abc
progress: {url: "http://operator.finetune:8443/"}
storage:
  s3: {endpoint: "http://s3.test:9000", allowHttp: true}
  gcs: {endpoint: "https://gcs.test"}
  azure: {account: team}
  hub: {endpoint: "http://hub.test"}
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


def test_every_manifest_parses_with_the_clients_models_and_has_no_misspelled_field() -> None:
    job = a_job(distribution={"nodes": 2, "processesPerNode": 4}, resources={"gpu": {}})
    run = plan(job, _SETTINGS)
    V1Job.model_validate(manifests.attempt_job(job, run, _SETTINGS, Restarts()))
    V1Job.model_validate(manifests.preflight_job(job, run, _SETTINGS))
    V1Job.model_validate(manifests.cleanup_job(job, run, _SETTINGS))
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
        "POD_NAME", "FINETUNE_RUN_CONFIG", "FINETUNE_TERMINATION_LOG", "HOME", "PYTHONSAFEPATH",
        "PYTHONNOUSERSITE",
        "HF_ENDPOINT",
    ]  # fmt: skip
    assert "envFrom" not in container


def test_variables_of_the_chart_and_of_the_job_reach_every_pod_and_the_jobs_win() -> None:
    pods = _SETTINGS.pods.model_copy(
        update={
            "env": (EnvVarSpec(name="NCCL_DEBUG", value="WARN"), EnvVarSpec(name="HTTPS_PROXY", value="http://p:1"))
        }
    )
    settings = _SETTINGS.model_copy(update={"pods": pods})
    job = a_job(pod={"env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "NCCL_IB_HCA", "value": "mlx5_0"}]})
    run = plan(job, settings)
    for built in (manifests.attempt_job(job, run, settings, Restarts()), manifests.preflight_job(job, run, settings)):
        (container,) = built["spec"]["template"]["spec"]["containers"]
        variables = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert (variables["NCCL_DEBUG"], variables["NCCL_IB_HCA"]) == ("INFO", "mlx5_0")
        assert variables["HTTPS_PROXY"] == "http://p:1"
        assert variables["FINETUNE_RUN_CONFIG"] == names.RUN_CONFIG_PATH
        assert len(variables) == len(container["env"])


def test_gpus_are_requested_by_the_trainer_and_never_by_the_check() -> None:
    job = a_job(distribution={"processesPerNode": 4}, resources={"gpu": {"name": "nvidia.com/a100"}, "cpu": "32"})
    run = plan(job, _SETTINGS)
    trainer = manifests.attempt_job(job, run, _SETTINGS, Restarts())["spec"]["template"]["spec"]["containers"][0]
    check = manifests.preflight_job(job, run, _SETTINGS)["spec"]["template"]["spec"]["containers"][0]
    assert trainer["resources"]["requests"] == trainer["resources"]["limits"]
    assert trainer["resources"]["limits"]["nvidia.com/a100"] == "4"
    assert "nvidia.com/a100" not in check["resources"]["limits"]
    assert check["args"] == ["preflight"]


def test_devices_of_the_network_are_requested_by_the_trainer_and_never_by_the_check() -> None:
    extra = {"rdma/hca": 8, "hugepages-2Mi": "5120Mi"}
    job = a_job(distribution={"processesPerNode": 8}, resources={"gpu": {}, "extra": extra})
    run = plan(job, _SETTINGS)
    trainer = manifests.attempt_job(job, run, _SETTINGS, Restarts())["spec"]["template"]["spec"]["containers"][0]
    check = manifests.preflight_job(job, run, _SETTINGS)["spec"]["template"]["spec"]["containers"][0]
    expected = {"rdma/hca": "8", "hugepages-2Mi": "5120Mi", "nvidia.com/gpu": "8"}
    assert trainer["resources"]["requests"].items() >= expected.items()
    assert trainer["resources"]["requests"] == trainer["resources"]["limits"]
    assert not expected.keys() & check["resources"]["limits"].keys()


@pytest.mark.parametrize(("pod", "seconds"), [({}, 90), ({"terminationGracePeriodSeconds": 900}, 900)])
def test_a_jobs_own_grace_period_wins_and_the_trainer_knows_it(pod: dict[str, Any], seconds: int) -> None:
    assert _pod(pod=pod)["terminationGracePeriodSeconds"] == seconds
    assert _run(pod=pod).grace_seconds == seconds


def test_local_disk_is_requested_with_a_limit_for_every_volume_on_it() -> None:
    pod = _pod(resources={"scratch": "20Gi"})
    (container,) = pod["containers"]
    requested = int(container["resources"]["requests"]["ephemeral-storage"])
    assert requested == int(container["resources"]["limits"]["ephemeral-storage"])
    volumes = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
    on_disk = [quantity_value(volume["sizeLimit"]) for volume in volumes if volume.get("medium") != "Memory"]
    assert len(on_disk) == 2  # scratch and /tmp
    assert (20 << 30) < sum(on_disk) < requested


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, {"pool": "gpu"}), ({"preflight_node_selector": {"pool": "cpu"}}, {"pool": "cpu"})],
)
def test_a_check_starts_no_gpu_node_of_the_jobs(settings: dict[str, Any], expected: dict[str, str]) -> None:
    """The job's labels and priority would make an autoscaler start a GPU node for the check."""
    changed = _SETTINGS.model_copy(update={"pods": _SETTINGS.pods.model_copy(update=settings)})
    job = a_job(
        pod={
            "nodeSelector": {"gpu": "h100"},
            "priorityClassName": "high",
            "tolerations": [{"key": "spot", "operator": "Exists"}],
        }
    )
    pod = manifests.preflight_job(job, plan(job, changed), changed)["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == expected
    assert "priorityClassName" not in pod
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["gpu"]


def test_a_check_is_not_repeated_for_what_only_a_person_can_fix() -> None:
    job = a_job(resources={"gpu": {}})
    spec = manifests.preflight_job(job, plan(job, _SETTINGS), _SETTINGS)["spec"]
    codes = set(spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"])
    assert codes == {r.exit_code for r in REASONS.values() if r.cause == "user" and r.exit_code}
    assert not codes & {r.exit_code for r in REASONS.values() if r.cause != "user"}


def test_a_check_ends_by_itself_at_its_deadline_or_else_by_the_kubelet() -> None:
    for policy, seconds in (
        ({}, 14400),
        ({"preflightSeconds": 600}, 600),
        ({"activeDeadlineSeconds": 90}, 90),
        ({"preflightSeconds": 600, "activeDeadlineSeconds": 900}, 600),
    ):
        job = a_job(resources={"gpu": {}}, run_policy=policy)
        run = plan(job, _SETTINGS)
        assert run.preflight_seconds == seconds
        pod = manifests.preflight_job(job, run, _SETTINGS)["spec"]["template"]["spec"]
        assert pod["activeDeadlineSeconds"] == seconds + 60
        training = manifests.attempt_job(job, run, _SETTINGS, Restarts())["spec"]["template"]["spec"]
        assert "activeDeadlineSeconds" not in training


def test_only_several_pods_need_names() -> None:
    assert "subdomain" not in _pod()
    assert _pod(distribution={"nodes": 2})["subdomain"] == "train-ranks"


def test_settings_and_job_both_place_the_pods() -> None:
    pod = _pod(
        pod={"nodeSelector": {"zone": "a", "pool": "mine"}, "tolerations": [{"key": "spot", "operator": "Exists"}]}
    )
    assert pod["nodeSelector"] == {"pool": "gpu", "zone": "a"}
    assert [t["key"] for t in pod["tolerations"]] == ["gpu", "spot"]
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["terminationGracePeriodSeconds"] == 90


def test_pods_prefer_nodes_whose_gpus_did_not_fail() -> None:
    job = a_job(resources={"gpu": {}})
    run = plan(job, _SETTINGS, attempt=2)
    body = manifests.attempt_job(job, run, _SETTINGS, Restarts(), ("node-a", "node-b"))
    V1Job.model_validate(body)
    (term,) = body["spec"]["template"]["spec"]["affinity"]["nodeAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert term["weight"] == 100
    assert term["preference"]["matchFields"] == [
        {"key": "metadata.name", "operator": "NotIn", "values": ["node-a"]},
        {"key": "metadata.name", "operator": "NotIn", "values": ["node-b"]},
    ]
    stored = {**body, "metadata": {**body["metadata"], "uid": "child-2", "resourceVersion": "1"}}
    assert child_job(stored).avoided_nodes == ("node-a", "node-b")
    assert "affinity" not in _pod()
    assert names.ANNOTATION_AVOIDED_NODES not in _job()["metadata"]["annotations"]


@pytest.mark.parametrize("text", ["", "node-a", "{}", "[1]", '"node-a"'])
def test_a_changed_list_of_avoided_nodes_counts_as_empty(text: str) -> None:
    body = _job()
    body["metadata"] |= {"uid": "child-1", "resourceVersion": "1"}
    body["metadata"]["annotations"] = {names.ANNOTATION_AVOIDED_NODES: text}
    assert child_job(body).avoided_nodes == ()


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


def test_a_group_fails_together_and_pods_are_never_restarted_one_by_one() -> None:
    job = _job(distribution={"nodes": 3})
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    assert job["metadata"]["ownerReferences"][0]["controller"] is True


def _run(**sections: Any) -> RunConfig:
    return plan(a_job(**sections), _SETTINGS)


def test_paths_are_those_in_the_pod_and_messages_name_what_the_user_wrote() -> None:
    run = _run(model={"uri": "pvc://models/base/"}, dataset={"test": {"uri": "s3://data/test.jsonl"}})
    assert run.model.location.uri == "file:///mnt/pvc/models/base/"
    assert run.model.location.display == "pvc://models/base/"
    assert run.data.test is not None
    assert run.data.test.uri == "s3://data/test.jsonl"
    assert run.s3.endpoint == "http://s3.test:9000"
    assert (run.gcs.endpoint, run.azure.account) == ("https://gcs.test", "team")
    assert run.progress is not None
    assert run.progress.url == "http://operator.finetune:8443/v1/progress"


@pytest.mark.parametrize(
    ("distribution", "chosen"),
    [({}, ("auto", "none")), ({"strategy": "zero3", "offload": "optimizer"}, ("zero3", "optimizer"))],
    ids=["auto, where the memory is known", "as requested"],
)
def test_what_is_sharded_is_decided_in_the_trainer_where_the_hardware_is_known(
    distribution: dict[str, Any], chosen: tuple[str, str]
) -> None:
    world = _run(distribution=distribution).world
    assert (world.strategy, world.offload) == chosen


@pytest.mark.parametrize(("cpu", "processes", "threads"), [("8", 2, 4), ("900m", 2, 1), ("3", 2, 1), ("16", 1, 16)])
def test_a_process_gets_its_share_of_the_cores(cpu: str, processes: int, threads: int) -> None:
    run = _run(resources={"cpu": cpu}, distribution={"processesPerNode": processes})
    assert run.world.threads_per_process == threads


def test_inputs_are_checked_beforehand_if_gpus_would_wait_for_it() -> None:
    gpu = {"gpu": {}}
    assert not needs_preflight(a_job().spec)
    assert needs_preflight(a_job(resources=gpu).spec)
    assert not needs_preflight(a_job(resources=gpu, run_policy={"preflight": "never"}).spec)
    assert needs_preflight(a_job(run_policy={"preflight": "always"}).spec)


def test_a_pod_that_cleans_has_no_more_than_it_needs() -> None:
    """Secrets, claims and volumes of the inputs may be gone by then."""
    volumes = [
        {"name": "base", "claim": {"name": "models"}},
        {"name": "work", "claim": {"name": "w", "readOnly": False}},
    ]
    job = a_job(
        model={"uri": "volume://base/llama"},
        dataset={"uri": "pvc://rows/train.jsonl", "credentialsRef": {"name": "rows"}},
        output={"uri": "volume://work/x", "credentialsRef": {"name": "keys"}, "deletionPolicy": "DeleteCheckpoints"},
        resources={"gpu": {}, "scratch": "500Gi"},
        pod={"volumes": volumes, "nodeSelector": {"pool": "h100"}, "priorityClassName": "high"},
    )
    body = manifests.cleanup_job(job, plan(job, _SETTINGS), _SETTINGS)
    pod = body["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert body["metadata"]["name"] == "train-clean"
    assert (body["spec"]["activeDeadlineSeconds"], body["spec"]["backoffLimit"]) == (600, 4)
    assert {v["name"] for v in pod["volumes"]} == {"tmp", "run-config", "credentials-output", "volume-work"}
    assert container["args"] == ["cleanup"]
    assert container["resources"]["limits"] == {"cpu": "1", "memory": "2Gi", "ephemeral-storage": str(3 << 30)}
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert not {"priorityClassName", "affinity", "runtimeClassName"} & pod.keys()
    run = parse(body["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_RUN_CONFIG])
    assert run.deletion_policy == "DeleteCheckpoints"


def test_another_deletion_policy_concerns_no_pod_that_trains() -> None:
    before, after = a_job(), a_job(output={"deletionPolicy": "Delete"})
    assert manifests.attempt_job(before, plan(before, _SETTINGS), _SETTINGS, Restarts()) == manifests.attempt_job(
        after, plan(after, _SETTINGS), _SETTINGS, Restarts()
    )


def test_the_specs_digest_is_about_what_is_trained() -> None:
    assert spec_digest(a_job().spec) == spec_digest(a_job(output={"deletionPolicy": "Delete"}).spec)
    assert spec_digest(a_job().spec) == spec_digest(a_job(run_policy={"suspend": True}).spec)
    assert spec_digest(a_job().spec) != spec_digest(a_job(training={"seed": 7}).spec)


def test_the_plan_of_every_attempt_is_the_same_except_for_its_number() -> None:
    job = a_job(distribution={"nodes": 2})
    first, second = plan(job, Settings(), 1), plan(job, Settings(), 2)
    assert second.world.master_address == "train-2-0.train-ranks"
    again = second.model_copy(update={"job": first.job, "world": first.world})
    assert again == first


def test_the_service_selects_only_the_pod_of_node_rank_0() -> None:
    selector = manifests.service(a_job())["spec"]["selector"]
    assert selector["batch.kubernetes.io/job-completion-index"] == "0"
    assert selector[names.LABEL_JOB_UID] == "job-uid"
