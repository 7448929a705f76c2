"""A namespace without a limit on its FineTuneJobs accepts none, if the administrator says so."""

from __future__ import annotations

import pytest
import yaml

from chart.support.helm_rendering import of_kind, render
from conftest import ControlPlane
from k8s_operator.support.kubelet_stand_in import World, job_body

pytestmark = pytest.mark.cluster

_LIMIT = "count/finetunejobs.finetune-operator.io"


def test_a_namespace_needs_a_quota_which_bounds_its_jobs(crd: ControlPlane, helm: str, world: World) -> None:
    objects = render(helm, "tenants.requireQuota=true", "admissionPolicies.enabled=false", release="quota")
    policies = yaml.safe_dump_all(
        of_kind(objects, "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
    )

    def refusal(name: str = "one") -> str:
        answer = world.request("POST", world.path("finetunejobs"), job_body(name), dryRun="All")
        return "" if answer.accepted else answer.message

    assert refusal() == ""
    crd.kubectl("apply", "-f", "-", stdin=policies)
    try:
        world.wait(refusal, 30)
        quota = {"metadata": {"name": "finetune-jobs"}, "spec": {"hard": {"pods": "5"}}}
        world.create("resourcequotas", quota)
        world.wait(lambda: f"doesn't limit {_LIMIT}" in refusal(), 30)
        hard = {"spec": {"hard": {_LIMIT: "1"}}}
        assert world.patch("resourcequotas", "finetune-jobs", hard).accepted
        world.wait(lambda: not refusal(), 30)
        world.submit("one")
        world.wait(lambda: "exceeded quota" in refusal("two"), 30)
    finally:
        crd.kubectl("delete", "-f", "-", "--ignore-not-found", stdin=policies)
        world.delete("resourcequotas", "finetune-jobs")
        world.wait(lambda: not refusal("three"), 60)
