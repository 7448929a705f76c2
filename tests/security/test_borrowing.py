"""What a job may name: the administrator's lists decide, and labels of what belongs to others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.destinations import is_listed, is_listed_url
from finetune_api.status import Restarts
from finetune_operator.core.plan import plan
from finetune_operator.core.pods import manifests
from finetune_operator.core.pods.network_policy import network_policy
from finetune_operator.core.pods.offers import NotOffered, check_offered, unlisted
from finetune_operator.settings import Settings, parse
from k8s_operator.support.observed_states import a_job

_SECRET = {"credentialsRef": {"name": "payments-db"}}
_MLFLOW = {"uri": "https://evil.example", "credentialsRef": {"name": "payments-db"}}


def _env(name: str, value: str) -> dict[str, Any]:
    return {"pod": {"env": [{"name": name, "value": value}]}}


_NARROW = """
tenants:
  secrets: [s3, hf-*]
  storageClasses: [scratch-*]
  schedulers: [default-scheduler]
  queues: [team-*]
  labelKeys: [team]
  volumeImages: [registry/models/*]
  trackers: [https://mlflow.example/team]
"""

# case | settings | sections of the spec | field | what else is in the message
_REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "T13 a system priority": (
        "", {"pod": {"priorityClassName": "system-node-critical"}}, "spec.pod.priorityClassName", "there are none"),
    "T13 another priority": (
        "tenants: {priorityClasses: [low]}", {"pod": {"priorityClassName": "high"}}, "spec.pod.priorityClassName",
        "low"),
    "T13 every taint": ("", {"pod": {"tolerations": [{"operator": "Exists"}]}}, "spec.pod.tolerations", "every key"),
    "T13 every taint with an effect": (
        "", {"pod": {"tolerations": [{"operator": "Exists", "effect": "NoExecute"}]}}, "spec.pod.tolerations",
        "every key"),
    "T13 the control plane": (
        "", {"pod": {"tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]}},
        "spec.pod.tolerations", "tenants.tolerationKeys: nvidia.com/gpu, node.kubernetes.io/not-ready, "),
    "T13 nodes of others": ("", {"pod": {"nodeSelector": {"pool": "production"}}}, "spec.pod.nodeSelector", "pool"),
    "T13 one node": (
        "", {"pod": {"nodeSelector": {"kubernetes.io/hostname": "cp-1"}}}, "spec.pod.nodeSelector", "hostname"),
    "T13 nodes of others, by affinity": (
        "", {"pod": {"nodeAffinity": {"required": [{"key": "pool", "operator": "Exists"}]}}}, "spec.pod.nodeAffinity",
        "pool"),
    "T13 nodes of others, by preference": (
        "", {"pod": {"nodeAffinity": {"preferred": [{"key": "pool", "operator": "In", "values": ["p"]}]}}},
        "spec.pod.nodeAffinity", "pool"),
    "T14 a Secret for the data": (_NARROW, {"dataset": _SECRET}, "spec.dataset.credentialsRef", "s3, hf-*"),
    "T14 a Secret for the model": (_NARROW, {"model": _SECRET}, "spec.model.credentialsRef", "payments-db"),
    "T14 a Secret for the output": (_NARROW, {"output": _SECRET}, "spec.output.credentialsRef", "payments-db"),
    "T14 a Secret for a tracker": (
        _NARROW, {"tracking": {"wandb": {"project": "p", **_SECRET}}}, "spec.tracking.wandb.credentialsRef", "s3"),
    "T14 a Secret for MLflow": (
        _NARROW, {"tracking": {"mlflow": {**_MLFLOW, "uri": "https://mlflow.example/team"}}},
        "spec.tracking.mlflow.credentialsRef", "s3"),
    "T14 a Secret for images": (
        _NARROW, {"pod": {"imagePullSecrets": [{"name": "payments-db"}]}}, "spec.pod.imagePullSecrets", "s3"),
    "T11 a tracker": (
        _NARROW, {"tracking": {"mlflow": {"uri": "https://evil.example"}}}, "spec.tracking.mlflow.uri",
        "https://mlflow.example/team"),
    "T14 an image that a node has pulled for somebody else": (
        _NARROW, {"pod": {"volumes": [{"name": "v", "image": {"reference": "theirs:1", "pullPolicy": "Never"}}]}},
        "spec.pod.volumes", "registry/models/*"),
    "T12 a proxy": ("", _env("HTTPS_PROXY", "http://169.254.169.254"), "spec.pod.env", "there are none"),
    "T12 a proxy in lowercase": ("", _env("https_proxy", "proxy.evil:3128"), "spec.pod.env", "proxy.evil"),
    "T12 a proxy for everything": ("", _env("ALL_PROXY", "socks5://10.96.0.1:1080"), "spec.pod.env", "there are none"),
    "T12 another proxy than the listed one": (
        "tenants: {proxies: ['http://proxy:3128']}", _env("HTTP_PROXY", "http://proxy:3129"), "spec.pod.env",
        "http://proxy:3128"),
    "T12 a proxy whose name begins like the listed one": (
        "tenants: {proxies: ['http://proxy:3128']}", _env("http_proxy", "http://proxy:3128.evil"), "spec.pod.env",
        "http://proxy:3128"),
    "T12 an exception from the administrator's proxy": (
        "pods: {env: [{name: HTTPS_PROXY, value: 'http://proxy:3128'}]}", _env("no_proxy", "*"), "spec.pod.env",
        "no_proxy=*"),
    "T15 AppArmor off": (
        "tenants: {annotationKeys: ['*']}",
        {"pod": {"annotations": {"container.apparmor.security.beta.kubernetes.io/trainer": "unconfined"}}},
        "spec.pod.annotations", "protection"),
    **{f"T15 {key}": ("", {"pod": {"annotations": {key: "x"}}}, "spec.pod.annotations", key) for key in (
        "vault.hashicorp.com/agent-inject", "sidecar.istio.io/inject", "k8s.v1.cni.cncf.io/networks",
        "seccomp.security.alpha.kubernetes.io/pod", "iam.amazonaws.com/role", "linkerd.io/inject", "plain")},
    "T14 a Secret for a volume": (
        _NARROW + "pods: {allowedCsiDrivers: [csi.example]}",
        {"pod": {"volumes": [{"name": "v", "csi": {"driver": "csi.example", "secretRef": {"name": "payments-db"}}}]}},
        "spec.pod.volumes", "s3"),
    "a label of others": (_NARROW, {"pod": {"labels": {"app": "payments"}}}, "spec.pod.labels", "app"),
    "a class of disks": (
        _NARROW, {"resources": {"scratchStorageClass": "gold"}}, "spec.resources.scratchStorageClass", "scratch-*"),
    "a scheduler": (_NARROW, {"pod": {"schedulerName": "mine"}}, "spec.pod.schedulerName", "default-scheduler"),
    "a queue": (_NARROW, {"run_policy": {"queueName": "others"}}, "spec.runPolicy.queueName", "team-*"),
    "P10 a device": (
        "", {"resources": {"extra": {"devices.kubevirt.io/kvm": 1}}}, "spec.resources.extra", "rdma/*"),
    "P10 a GPU of another name": ("", {"resources": {"gpu": {"name": "nvidia.com/x"}}}, "spec.resources.gpu.name",
                                  "nvidia.com/gpu"),
    "P10 a GPU that isn't listed": (
        "tenants: {gpus: [nvidia.com/mig-1g.10gb]}", {"resources": {"gpu": {}}}, "spec.resources.gpu.name", "mig"),
}  # fmt: skip


@pytest.mark.parametrize("case", _REFUSED)
def test_a_job_may_not_name_what_is_not_listed(case: str) -> None:
    settings, sections, field, message = _REFUSED[case]
    with pytest.raises(NotOffered) as refusal:
        check_offered(a_job(**sections), parse(settings))
    assert (refusal.value.field, refusal.value.reason) == (field, "NotAllowed")
    assert message in str(refusal.value)


_ALLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("", {}),
    "GPUs": ("", {"resources": {"gpu": {"name": "nvidia.com/mig-3g.40gb"}, "extra": {"rdma/hca": 1}}}),
    "a taint of GPUs": ("", {"pod": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}}),
    "hardware": ("", {"pod": {"nodeSelector": {"nvidia.com/gpu.product": "H100", "topology.kubernetes.io/zone": "a"}}}),
    "every taint": ("tenants: {tolerationKeys: ['*']}", {"pod": {"tolerations": [{"operator": "Exists"}]}}),
    "a priority": ("tenants: {priorityClasses: [low]}", {"pod": {"priorityClassName": "low"}}),
    "an annotation": ("", {"pod": {"annotations": {"karpenter.sh/do-not-disrupt": "true"}}}),
    "a Secret": (_NARROW, {"dataset": {"credentialsRef": {"name": "hf-token"}}}),
    "a tracker": (_NARROW, {"tracking": {"mlflow": {"uri": "https://mlflow.example/team/a"}}}),
    "any tracker": ("", {"tracking": {"mlflow": {"uri": "http://mlflow:5000"}}}),
    "a label": (_NARROW, {"pod": {"labels": {"team": "a"}}}),
}


@pytest.mark.parametrize("case", _ALLOWED)
def test_a_job_may_name_what_is_listed(case: str) -> None:
    settings, sections = _ALLOWED[case]
    check_offered(a_job(**sections), parse(settings))


# settings | pod and uris | label of the object, None if there is none | whether it may be named
_ACCOUNT = {"pod": {"serviceAccountName": "payments-prod"}}
_OUTPUT, _INPUT = {"output": {"uri": "pvc://data/x"}}, {"dataset": {"uri": "pvc://data/x"}}
_STRICT = "tenants: {claims: []}"
_VOLUME = {"pod": {"volumes": [{"name": "v", "claim": {"name": "data"}}]}}


@pytest.mark.parametrize(
    ("settings", "sections", "label", "allowed"),
    [
        ("", _ACCOUNT, None, False),
        ("", _ACCOUNT, "", False),
        ("", _ACCOUNT, "output", False),
        ("", _ACCOUNT, "training", True),
        (_STRICT, _OUTPUT, None, False),
        (_STRICT, _OUTPUT, "input", False),
        (_STRICT, _OUTPUT, "training", False),
        (_STRICT, _OUTPUT, "output", True),
        (_STRICT, _INPUT, "input", True),
        (_STRICT, _INPUT, "output", True),
        (_STRICT, _INPUT, "", False),
        (_STRICT, _INPUT | _OUTPUT, "input", False),
        (_STRICT, _VOLUME, "input", True),
        (_STRICT, _VOLUME, None, False),
    ],
)
def test_t14_an_account_or_a_claim_is_opened_by_its_label(
    settings: str, sections: dict[str, Any], label: str | None, allowed: bool
) -> None:
    job = a_job(**sections)
    check_offered(job, parse(settings))
    (entry,) = unlisted(job, parse(settings))
    existing = None if label is None else {"metadata": {"labels": {"finetune-operator.io/use": label}}}
    refusal = entry.refusal(existing)
    assert (refusal is None) is allowed
    if refusal:
        assert refusal.reason == "NotAllowed"
        assert "finetune-operator.io/use" in str(refusal) or "doesn't exist" in str(refusal)
    for strange in ({}, {"metadata": {}}, {"metadata": {"labels": None}}):
        assert entry.refusal(strange) is not None


def test_t14_listed_accounts_and_claims_are_not_looked_up() -> None:
    settings = parse("tenants: {serviceAccounts: [payments-*], claims: [data]}")
    assert unlisted(a_job(**_ACCOUNT, **_OUTPUT), settings) == ()
    assert unlisted(a_job(**_OUTPUT), Settings()) == ()


def test_t13_the_keys_of_the_administrator_win() -> None:
    settings = parse(
        "pods: {nodeSelector: {pool: training}, networkProfiles: {rdma: {annotations: {a: admin}}}}\n"
        "tenants: {nodeLabelKeys: ['*'], annotationKeys: ['*']}"
    )
    job = a_job(pod={"nodeSelector": {"pool": "production", "x": "y"}, "annotations": {"a": "job"}, "network": "rdma"})
    template = manifests.attempt_job(job, plan(job, settings), settings, Restarts())["spec"]["template"]
    assert template["spec"]["nodeSelector"] == {"pool": "training", "x": "y"}
    assert template["metadata"]["annotations"]["a"] == "admin"


@pytest.mark.parametrize("profile", ["", "RuntimeDefault"])
def test_t15_the_profile_of_app_armor_is_the_administrators(profile: str) -> None:
    settings, job = parse(f"pods: {{appArmorProfile: '{profile}'}}"), a_job()
    run = plan(job, settings)
    for body in (manifests.attempt_job(job, run, settings, Restarts()), manifests.preflight_job(job, run, settings)):
        context = body["spec"]["template"]["spec"]["securityContext"]
        assert context.get("appArmorProfile") == ({"type": profile} if profile else None)


@pytest.mark.parametrize(
    ("url", "listed"),
    [
        ("https://mlflow.example/team", True),
        ("https://mlflow.example:443/team/a", True),
        ("https://MLFLOW.example./team/", True),
        ("http://mlflow.example/team", False),
        ("https://mlflow.example:8443/team", False),
        ("https://mlflow.example/teams", False),
        ("https://mlflow.example/", False),
        ("https://mlflow.example.evil/team", False),
        ("https://mlflow.example@evil/team", False),
        ("https://evil/mlflow.example/team", False),
        ("https://mlflow.example/team/../other", False),
        ("https://mlflow.example/team/%2e%2E/other", False),
        ("https://evil\\@mlflow.example/team", False),
        ("https://mlflow.example\\.evil/team", False),
        ("ftp://mlflow.example/team", False),
        ("https://mlflow.example:99999/team", False),
        ("https:///team", False),
        ("", False),
    ],
)
def test_t11_a_url_is_listed_with_its_origin_and_by_segments(url: str, listed: bool) -> None:
    assert is_listed_url(url, ("https://mlflow.example/team",)) is listed


@pytest.mark.parametrize(
    ("name", "entries", "listed"),
    [
        ("a", ("a",), True),
        ("ab", ("a",), False),
        ("ab", ("a*",), True),
        ("a", ("*",), True),
        ("a*", ("a",), False),
        ("ba", ("a*",), False),
        ("a", (), False),
        ("axb", ("a*b",), False),
    ],
)
def test_a_name_is_listed_by_itself_or_its_beginning(name: str, entries: tuple[str, ...], listed: bool) -> None:
    assert is_listed(name, entries) is listed


def test_t3_the_pods_of_a_job_are_closed_to_all_others() -> None:
    settings = parse("networkPolicies: {metricsFrom: [{namespaceSelector: {matchLabels: {name: monitoring}}}]}")
    policy = network_policy(a_job(), settings)
    own = {"podSelector": {"matchLabels": {"finetune-operator.io/job-uid": "job-uid"}}}
    spec = policy["spec"]
    assert spec["podSelector"] == own["podSelector"]
    assert spec["policyTypes"] == ["Ingress"]
    others = [rule for rule in spec["ingress"] if rule["from"] != [own]]
    assert others == [
        {"from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}], "ports": [{"port": "metrics"}]}
    ]
    for body in (manifests.attempt_job(job := a_job(), run := plan(job, settings), settings, Restarts()),
                 manifests.preflight_job(job, run, settings)):  # fmt: skip
        labels = body["spec"]["template"]["metadata"]["labels"]
        assert own["podSelector"]["matchLabels"].items() <= labels.items()


def test_t12_pods_reach_only_what_the_administrator_lists() -> None:
    rule = {"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"port": 443}]}
    spec = network_policy(a_job(), parse(json.dumps({"networkPolicies": {"egress": [rule]}})))["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == [{"to": [{"podSelector": spec["podSelector"]}]}, rule]


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ("tenants: {proxies: ['http://proxy:3128']}", "HTTPS_PROXY", "http://proxy:3128"),
        ("tenants: {proxies: ['http://proxy:3128']}", "https_proxy", "proxy:3128"),
        ("tenants: {proxies: ['*']}", "ALL_PROXY", "socks5://other:1080"),
        ("", "NO_PROXY", ".svc"),
        ("tenants: {proxies: ['*']}\npods: {env: [{name: HTTPS_PROXY, value: 'http://p:1'}]}", "NO_PROXY", ".svc"),
    ],
)
def test_t12_a_job_may_name_a_listed_proxy(settings: str, name: str, value: str) -> None:
    check_offered(a_job(**_env(name, value)), parse(settings))
