"""The values of docs/hardening.md are valid, and make the choices that the page names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from chart.support.helm_rendering import Object, of_kind, render
from conftest import ROOT
from finetune_operator.core.pods.network_policy import network_policy
from finetune_operator.core.pods.offers import NotOffered, check_offered, unlisted
from finetune_operator.settings import Settings, parse
from k8s_operator.support.observed_states import a_job


@pytest.fixture(scope="module")
def hardened(helm: str, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    text = (ROOT / "docs" / "hardening.md").read_text()
    file: Path = tmp_path_factory.mktemp("values") / "values.yaml"
    file.write_text(text.split("```yaml\n", 1)[1].split("```", 1)[0])
    return render(helm, values=file)


def _settings(objects: list[Object]) -> Settings:
    (config,) = [one for one in of_kind(objects, "ConfigMap") if "config.yaml" in one["data"]]
    return parse(config["data"]["config.yaml"])


def test_the_hardened_values_restrict_what_the_defaults_leave_open(hardened: list[Object]) -> None:
    strict, default = _settings(hardened), Settings()
    for sections in (
        {"dataset": {"credentialsRef": {"name": "payments-db"}}},
        {"pod": {"labels": {"app": "payments"}}},
        {"pod": {"schedulerName": "mine"}},
        {"resources": {"scratchStorageClass": "gold"}},
        {"tracking": {"mlflow": {"uri": "https://evil.example"}}},
    ):
        job = a_job(**sections)
        check_offered(job, default)
        with pytest.raises(NotOffered):
            check_offered(job, strict)
    job = a_job(output={"uri": "pvc://somebody-elses/x"})
    assert not unlisted(job, default)
    assert unlisted(job, strict)


def test_the_hardened_pods_reach_each_other_and_what_is_listed(hardened: list[Object]) -> None:
    spec = network_policy(a_job(), _settings(hardened))["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    own, dns, internet, operator = spec["egress"]
    assert own == {"to": [{"podSelector": spec["podSelector"]}]}
    assert {port["port"] for port in dns["ports"]} == {53}
    assert "169.254.0.0/16" in internet["to"][0]["ipBlock"]["except"]
    assert operator["ports"] == [{"port": 8443}]
    (deployment,) = of_kind(hardened, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert operator["to"][0]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_hardened_release_has_rights_in_its_namespaces_and_bounds_their_jobs(hardened: list[Object]) -> None:
    (quota,) = of_kind(hardened, "ResourceQuota")
    assert quota["spec"]["hard"] == {"count/finetunejobs.finetune-operator.io": "100"}
    assert quota["metadata"]["namespace"] == "ml-team"
    (cluster_role,) = [
        role for role in of_kind(hardened, "ClusterRole") if "aggregate" not in yaml.safe_dump(role["metadata"])
    ]
    assert [rule["resources"] for rule in cluster_role["rules"]] == [["tokenreviews"]]
    (operator,) = of_kind(hardened, "NetworkPolicy")
    progress = next(rule for rule in operator["spec"]["ingress"] if rule["ports"] == [{"port": "progress"}])
    expressions = progress["from"][0]["namespaceSelector"]["matchExpressions"]
    assert expressions == [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["ml-team"]}]
