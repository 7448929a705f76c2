"""Facts about what the real helm renders from the chart: rights, pods, settings, and refused
values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.support.helm_rendering import CHART, EVERYTHING, NAMESPACE, of_kind, pod_specs, render, run
from finetune_api import names
from finetune_api.messages.run import AzureConfig, GcsConfig, S3Config
from finetune_operator.settings import (
    LeaderElectionSettings,
    NetworkPolicySettings,
    ProgressSettings,
    Settings,
    StorageSettings,
    parse,
)

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def test_helm_lint_passes(helm: str) -> None:
    done = run(helm, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "sets", [(), ("watchNamespaces={team-a,team-b}",), EVERYTHING], ids=["all", "some", "monitored"]
)
def test_no_role_reads_secrets_or_has_a_wildcard(helm: str, sets: tuple[str, ...]) -> None:
    for role in of_kind(render(helm, *sets), "ClusterRole", "Role"):
        for rule in role["rules"]:
            names = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in names, role["metadata"]["name"]
            assert not {"secrets", "pods/exec", "nodes"} & set(rule["resources"])
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_the_operator_has_the_few_rights_that_it_needs(helm: str) -> None:
    (role,) = [
        r for r in of_kind(render(helm), "ClusterRole") if not r["metadata"]["name"].endswith(("-view", "-edit"))
    ]
    rights = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {resource for resource, verb in rights if verb not in ("get", "list", "watch")} == {
        "tokenreviews", "finetunejobs", "finetunejobs/status", "finetunejobs/finalizers", "jobs", "services",
        "networkpolicies", "events",
    }  # fmt: skip
    # A policy of the chart restricts patch to the operator's finalizer (tests/security).
    assert {verb for resource, verb in rights if resource == "finetunejobs"} == {"get", "list", "watch", "patch"}
    assert ("pods", "delete") not in rights


def test_with_chosen_namespaces_only_token_reviews_are_cluster_wide(helm: str) -> None:
    objects = render(helm, "watchNamespaces={team-a,team-b}", "rbac.aggregate=false")
    (cluster_role,) = of_kind(objects, "ClusterRole")
    assert [rule["resources"] for rule in cluster_role["rules"]] == [["tokenreviews"]]
    assert {role["metadata"]["namespace"] for role in of_kind(objects, "Role")} == {NAMESPACE, "team-a", "team-b"}
    assert {one["metadata"]["namespace"] for one in of_kind(objects, "RoleBinding")} == {NAMESPACE, "team-a", "team-b"}


def test_the_lease_is_the_only_one_that_may_be_changed(helm: str) -> None:
    (role,) = of_kind(render(helm), "Role")
    create, change = role["rules"]
    assert create["verbs"] == ["create"]
    assert change == {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": ["finetune-operator"],
        "verbs": ["get", "update"],
    }


def test_every_pod_is_restricted_and_has_limits(helm: str) -> None:
    specs = pod_specs(render(helm, *EVERYTHING))
    assert len(specs) == 2
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all("hostPath" not in volume for volume in spec.get("volumes", ()))
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_the_deployment_has_two_replicas_probes_and_the_ports_of_the_contract(helm: str) -> None:
    objects = render(helm)
    (deployment,) = of_kind(objects, "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert deployment["spec"]["replicas"] == 2
    assert ports == {
        names.METRICS_PORT_NAME: names.OPERATOR_METRICS_PORT,
        "probes": names.OPERATOR_PROBES_PORT,
        "progress": names.OPERATOR_PROGRESS_PORT,
    }
    assert {"startupProbe", "livenessProbe", "readinessProbe"} < set(container)
    (service,) = of_kind(objects, "Service")
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert of_kind(objects, "PodDisruptionBudget")
    assert not of_kind(render(helm, "replicaCount=1"), "PodDisruptionBudget")


def test_helm_test_is_pulled_and_scheduled_like_the_operator(helm: str, tmp_path: Path) -> None:
    values = {
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"pool": "system", "kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "system", "effect": "NoSchedule"}],
    }
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    test_pod, operator_pod = pod_specs(render(helm, values=file))
    for spec in (test_pod, operator_pod):
        assert {key: spec.get(key) for key in values} == values
    for spec in pod_specs(render(helm)):
        assert not values.keys() & spec.keys()


def settings_of(objects: list[dict[str, Any]]) -> Settings:
    (config,) = [one for one in of_kind(objects, "ConfigMap") if "config.yaml" in one["data"]]
    return parse(config["data"]["config.yaml"])


def test_the_default_values_are_the_operators_defaults(helm: str) -> None:
    settings = settings_of(render(helm))
    assert settings == Settings(
        trainer_image="finetune-trainer:0.1.0",
        leader_election=LeaderElectionSettings(namespace=NAMESPACE, name="finetune-operator"),
        progress=ProgressSettings(
            url=f"https://finetune-operator.{NAMESPACE}.svc:8443", certificate="/etc/finetune/tls"
        ),
        storage=StorageSettings(
            s3=S3Config(allowed_endpoints=()),
            gcs=GcsConfig(allowed_endpoints=()),
            azure=AzureConfig(allowed_endpoints=()),
        ),
        network_policies=NetworkPolicySettings(metrics_from=tuple(VALUES["networkPolicy"]["metricsFrom"])),
    )


def test_every_setting_reaches_the_operator(helm: str, tmp_path: Path) -> None:
    values = {
        "trainer": {"image": {"repository": "registry:5000/t", "tag": "1", "digest": "sha256:" + "a" * 64,
                              "pullPolicy": "Always"}},
        "watchNamespaces": ["a", "b"],
        "leaderElection": {"leaseSeconds": 30, "renewSeconds": 20, "retrySeconds": 0.5},
        "progress": {"enabled": False, "intervalSeconds": 1.5, "writeEverySeconds": 60},
        "storage": {"s3": {"endpoint": "http://s3:9000", "region": "eu", "allowHttp": True, "allowedEndpoints": ["*"]},
                    "gcs": {"endpoint": "http://gcs:4443", "allowHttp": True, "allowedEndpoints": ["https://g"]},
                    "azure": {"account": "team", "endpoint": "http://azurite:10000/team", "allowHttp": True,
                              "allowedEndpoints": ["https://a"]},
                    "hub": {"endpoint": "https://hub"}},
        "models": {"allowedLicenses": ["apache-2.0", "mit"], "cache": {"claim": "models", "size": "10Gi"}},
        "limits": {"requestsPerSecond": 7.5, "burst": 9, "workers": 3},
        "pods": {"gracePeriodSeconds": 1000000, "metricsLingerSeconds": 35, "preflightCpu": 2, "preflightMemory": "1Gi",
                 "tolerations": [{"key": "gpu", "operator": "Exists"}], "nodeSelector": {"a": "b"},
                 "preflightNodeSelector": {"pool": "cpu"}, "preflightTolerations": [{"operator": "Exists"}],
                 "preflightRuntimeClassName": "runc", "cleanupSeconds": 60, "cpuLimit": False, "gpusPerNode": 4,
                 "caBundle": {"configMap": "ca", "key": "bundle.pem"}, "allowedImages": ["registry/trainers/"],
                 "allowedCsiDrivers": ["gcsfuse.csi.storage.gke.io"],
                 "networkProfiles": {"roce": {"resources": {"rdma/roce": 8}, "capabilities": ["IPC_LOCK"]}},
                 "schedulerName": "s", "runtimeClassName": "r", "appArmorProfile": "RuntimeDefault",
                 "imagePullSecrets": ["pull"],
                 "env": [{"name": "NCCL_IB_GID_INDEX", "value": "3"}]},
        "sweepSeconds": 60, "metricsRetentionSeconds": 1209600, "logLevel": "debug",
        "tenants": {key: [f"{key}-*"] for key in VALUES["tenants"] if isinstance(VALUES["tenants"][key], list)}
        | {"trackers": ["https://mlflow"], "proxies": ["http://proxy:3128", "*"]},
        "networkPolicy": {"metricsFrom": None, "jobs": {"enabled": False, "egress": [{"ports": [{"port": 53}]}]}},
    }  # fmt: skip
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    settings = settings_of(render(helm, values=file))
    assert settings.trainer_image == "registry:5000/t:1@sha256:" + "a" * 64
    assert settings.progress.url == ""
    assert settings.progress.port == 0
    assert settings.pods.grace_period_seconds == 1_000_000
    assert settings.pods.preflight_cpu == "2"
    assert settings.pods.cleanup_seconds == 60
    assert settings.pods.preflight_node_selector == {"pool": "cpu"}
    assert settings.metrics_retention_seconds == 1_209_600
    read_back = settings.to_json()
    assert read_back["networkPolicies"] == {"enabled": False, "metricsFrom": [], "egress": [{"ports": [{"port": 53}]}]}
    for section in ("leaderElection", "storage", "models", "limits", "tenants"):
        assert read_back[section].items() >= values[section].items()
    for key in ("tolerations", "env"):
        assert read_back["pods"][key] == values["pods"][key]
    unset = {"metricsPort", "probesPort"}
    default = Settings().to_json()
    same = {key for key in default if read_back[key] == default[key]} - unset
    assert not same, f"values do not reach {same}"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("replicas=2", "additional properties 'replicas' not allowed"),
        ("pods.gracePeriod=5", "gracePeriod"),
        ("replicaCount=two", "got string, want integer"),
        ("replicaCount=-1", "minimum"),
        ("logLevel=verbose", "must be one of"),
        ("storage.s3.endpoint=s3.example.com", "does not match pattern"),
        ("storage.gcs.endpoint=gcs.example.com", "does not match pattern"),
        ("storage.azure.account=evil.com/", "does not match pattern"),
        ("watchNamespaces={Team_A}", "does not match pattern"),
        ("image.digest=latest", "does not match pattern"),
        ("image.repository=repo:tag", "does not match pattern"),
        ("monitoring.podMonitor.interval=15", "string"),
        ("limits.workers=0", "minimum"),
        ("pods.tolerations=gpu", "array"),
        ("pods.env[0].name=NCCL_DEBUG", "value"),
    ],
)
def test_the_schema_refuses_a_wrong_value_by_its_name(helm: str, setting: str, message: str) -> None:
    done = run(helm, "template", "r", str(CHART), "--set", setting)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr
    assert setting.partition("=")[0].split(".")[-1] in done.stderr or message in done.stderr


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    return [path]


def test_the_schema_knows_every_value_and_nothing_else() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def known(node: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        if "properties" not in node or (not path and not node["properties"]):
            return [path]
        assert node["additionalProperties"] is False, path
        return [leaf for key, item in node["properties"].items() for leaf in known(item, (*path, key))]

    free = {("resources",), ("monitoring", "dashboard", "labels"), ("monitoring", "dashboard", "annotations")}
    in_values = {next((f for f in free if leaf[: len(f)] == f), leaf) for leaf in _leaves(VALUES)}
    in_schema = {leaf for leaf in known(schema) if leaf[:1] != ("global",) and leaf != ("imagePullSecrets", "name")}
    assert in_schema == in_values


def test_the_crd_can_be_left_out_and_is_kept_by_default(helm: str) -> None:
    (crd,) = of_kind(render(helm), "CustomResourceDefinition")
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (crd,) = of_kind(render(helm, "crds.keep=false"), "CustomResourceDefinition")
    assert "annotations" not in crd["metadata"]
    assert not of_kind(render(helm, "crds.install=false"), "CustomResourceDefinition")


def test_the_charts_crd_is_the_committed_one(helm: str) -> None:
    (file,) = (CHART.parents[1] / "crds").glob("*.yaml")
    (crd,) = of_kind(render(helm, "crds.keep=false"), "CustomResourceDefinition")
    assert crd == yaml.safe_load(file.read_text())


def test_two_releases_share_no_name(helm: str) -> None:
    def full_names(release: str) -> set[tuple[str, str, str]]:
        return {
            (one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"])
            for one in render(helm, "crds.install=false", *EVERYTHING, release=release)
        }

    assert not full_names("one") & full_names("two")


def test_nothing_of_the_prometheus_operator_is_rendered_by_default(helm: str) -> None:
    assert all("monitoring.coreos.com" not in one["apiVersion"] for one in render(helm))
    kinds = {one["kind"] for one in render(helm, *EVERYTHING)}
    assert {"ServiceMonitor", "PodMonitor", "PrometheusRule", "NetworkPolicy"} <= kinds


def test_the_pod_monitor_finds_trainer_pods_by_the_labels_of_the_contract(helm: str) -> None:
    (monitor,) = of_kind(render(helm, *EVERYTHING), "PodMonitor")
    labels = {**names.COMMON_LABELS, names.LABEL_ROLE: names.ROLE_TRAINER}
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == names.METRICS_PORT_NAME
    assert endpoint["honorLabels"] is False
    assert monitor["spec"]["namespaceSelector"] == {"any": True}


def test_a_scraped_pod_speaks_for_no_other_job(helm: str) -> None:
    objects = render(helm, *EVERYTHING)
    (endpoint,) = of_kind(objects, "PodMonitor")[0]["spec"]["podMetricsEndpoints"]
    meta = {
        "__meta_kubernetes_namespace": "team", "__meta_kubernetes_pod_controller_kind": "Job",
        "__meta_kubernetes_pod_controller_name": "mine-12",
    }  # fmt: skip
    target = _relabeled(meta, endpoint["relabelings"])
    assert target is not None
    assert (target["namespace"], target["job"]) == ("team", "mine")
    assert _relabeled({**meta, "__meta_kubernetes_pod_controller_kind": "ReplicaSet"}, endpoint["relabelings"]) is None
    forged = {"exported_namespace": "ml-team", "exported_job": "quickstart", "namespace": "team", "job": "mine"}
    rules = endpoint["metricRelabelings"]
    for name in ("finetune_job_status_condition", "finetune_operator_leader", "node_load1"):
        assert _relabeled({**forged, "__name__": name}, rules) is None
    own = {"__name__": "finetune_train_loss", "namespace": "team", "job": "mine"}
    assert _relabeled({**forged, "__name__": "finetune_train_loss"}, rules) == own
    (operator,) = of_kind(objects, "ServiceMonitor")[0]["spec"]["endpoints"]
    series = {"__name__": "finetune_job_step", **forged, "namespace": "finetune-system", "job": "finetune-operator"}
    about = _relabeled(series, operator["metricRelabelings"])
    assert about == {"__name__": "finetune_job_step", "namespace": "ml-team", "job": "quickstart"}
    lag = {"__name__": "finetune_operator_leader", "namespace": "finetune-system", "job": "finetune-operator"}
    assert _relabeled(lag, operator["metricRelabelings"]) == lag


def test_metrics_are_closed_by_default(helm: str) -> None:
    (policy,) = of_kind(render(helm), "NetworkPolicy")
    (rule,) = [rule for rule in policy["spec"]["ingress"] if rule["ports"] == [{"port": "metrics"}]]
    assert {"namespaceSelector": {}} not in rule["from"]
    assert all("podSelector" in peer or peer["namespaceSelector"]["matchLabels"] for peer in rule["from"])
    (closed,) = of_kind(render(helm, "networkPolicy.metricsFrom=null"), "NetworkPolicy")
    (rule,) = [rule for rule in closed["spec"]["ingress"] if rule["ports"] == [{"port": "metrics"}]]
    assert rule["from"] == [{"podSelector": {}}]


def _relabeled(labels: dict[str, str], rules: list[dict[str, Any]]) -> dict[str, str] | None:
    """The labels after relabeling, as Prometheus defines its actions; None if dropped."""
    labels = dict(labels)
    for rule in rules:
        pattern = re.compile(rule.get("regex", "(.*)"))
        hit = pattern.fullmatch(";".join(labels.get(name, "") for name in rule.get("sourceLabels", ())))
        match rule["action"]:
            case "keep" if not hit:
                return None
            case "drop" if hit:
                return None
            case "labeldrop":
                labels = {name: value for name, value in labels.items() if not pattern.fullmatch(name)}
            case "replace" if hit:
                labels[rule["targetLabel"]] = hit.group(1) if hit.groups() else hit.group()
    return labels


def test_a_changed_setting_restarts_the_operator(helm: str) -> None:
    def checksum(*sets: str) -> str:
        (deployment,) = of_kind(render(helm, *sets), "Deployment")
        return str(deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert checksum() != checksum("logLevel=debug")
    assert checksum() == checksum("replicaCount=3")


def test_the_commented_network_profiles_are_valid_settings(helm: str, tmp_path: Path) -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    first = lines.index("  networkProfiles: {}") + 1
    count = next(index for index, line in enumerate(lines[first:]) if not line.startswith("  #"))
    profiles = yaml.safe_load("\n".join(line.removeprefix("  #") for line in lines[first : first + count]))
    assert list(profiles) == ["infiniband", "roce", "efa", "gpudirect-tcpx"]
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"pods": {"networkProfiles": profiles}}))
    settings = settings_of(render(helm, values=file))
    assert settings.pods.network_profiles["efa"].resources["vpc.amazonaws.com/efa"] == "32"
    assert settings.pods.network_profiles["gpudirect-tcpx"].sidecars[0]["name"] == "tcpx-daemon"
