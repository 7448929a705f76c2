"""The health checks of docs/gitops.md: Argo CD's run in a Lua interpreter, Flux's in the API
server's own CEL."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaRuntime

from api.support.api_server import Server
from conftest import ROOT, ControlPlane

PROBES = "/apis/test.finetune-operator.io/v1/namespaces/default/probes"

GUIDE = (ROOT / "docs" / "gitops.md").read_text()
ARGO, FLUX = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL))
LUA = ARGO["data"]["resource.customizations.health.finetune-operator.io_FineTuneJob"]


def job(*conditions: str, observed: int | None = 2) -> dict[str, Any]:
    """A job of generation 2 whose named conditions are True."""
    status: dict[str, Any] = {"message": "step 5 of 10"}
    if observed is not None:
        status["observedGeneration"] = observed
    status["conditions"] = [
        {"type": kind, "status": "True" if kind in conditions else "False", "message": f"because {kind}"}
        for kind in ("Complete", "Failed", "Suspended", "Reconciling", "Stalled")
    ]
    return {"metadata": {"generation": 2}, "status": status}


# (name, job, Argo CD's status and message, Flux's)
STATES: tuple[tuple[str, dict[str, Any], tuple[str, str], str], ...] = (
    ("new", {"metadata": {"generation": 1}}, ("Progressing", "waiting for the operator"), "inProgress"),
    (
        "not yet read by an operator",
        {"metadata": {"generation": 1}, "status": {"observedGeneration": 0, "phase": "Pending"}},
        ("Progressing", "waiting for the operator"),
        "inProgress",
    ),
    ("changed", job("Suspended", observed=1), ("Progressing", "waiting for the operator"), "inProgress"),
    ("starting", job("Reconciling"), ("Progressing", "step 5 of 10"), "inProgress"),
    ("running", job(), ("Progressing", "step 5 of 10"), "inProgress"),
    ("suspended", job("Suspended"), ("Suspended", "because Suspended"), "inProgress"),
    ("complete", job("Complete"), ("Healthy", "because Complete"), "current"),
    ("failed", job("Failed", "Stalled"), ("Degraded", "because Failed"), "failed"),
    ("stalled", job("Stalled"), ("Degraded", "because Stalled"), "inProgress"),
)


@pytest.mark.parametrize(("body", "health"), [(row[1], row[2]) for row in STATES], ids=[row[0] for row in STATES])
def test_argo_cd_sees_the_state_of_a_job(body: dict[str, Any], health: tuple[str, str]) -> None:
    lua = LuaRuntime(unpack_returned_tuples=True)
    lua.globals().obj = lua.table_from(body, recursive=True)
    answer = lua.execute(LUA)
    assert (answer.status, answer.message) == health


EXPRESSIONS = {key: FLUX["spec"]["healthCheckExprs"][0][key] for key in ("inProgress", "failed", "current")}


def probe_crd() -> dict[str, Any]:
    """A CRD whose validation rules are Flux's expressions: a refusal shows which of them are
    false."""
    condition = {"type": "object", "properties": {key: {"type": "string"} for key in ("type", "status", "message")}}
    schema = {
        "type": "object",
        "properties": {
            "metadata": {"type": "object", "properties": {"generation": {"type": "integer"}}},
            "status": {
                "type": "object",
                "properties": {
                    "observedGeneration": {"type": "integer"},
                    "message": {"type": "string"},
                    "conditions": {"type": "array", "maxItems": 8, "items": condition},
                },
            },
        },
        "x-kubernetes-validations": [
            {
                "rule": re.sub(r"\b(status\.(?!=)|metadata\.)", r"self.\1", rule).replace("c.self.", "c."),
                "message": name,
            }
            for name, rule in EXPRESSIONS.items()
        ],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "probes.test.finetune-operator.io"},
        "spec": {
            "group": "test.finetune-operator.io",
            "scope": "Namespaced",
            "names": {"kind": "Probe", "plural": "probes"},
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": schema}}},
                }
            ],
        },
    }


@pytest.fixture(scope="module")
def probes(control_plane: ControlPlane) -> Iterator[Server]:
    text = json.dumps(probe_crd())
    control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=text)
    control_plane.kubectl(
        "wait", "--for=condition=Established", "crd/probes.test.finetune-operator.io", "--timeout=30s"
    )
    yield Server(control_plane.kubeconfig)
    control_plane.kubectl("delete", "crd", "probes.test.finetune-operator.io", "--wait=false")


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("body", "health"), [(row[1], row[3]) for row in STATES if "status" in row[1]], ids=[r[0] for r in STATES[1:]]
)
def test_flux_sees_the_state_of_a_job(body: dict[str, Any], health: str, probes: Server) -> None:
    probe = {"apiVersion": "test.finetune-operator.io/v1", "kind": "Probe", "metadata": {"name": "a"}, "spec": body}
    answer = probes.request("POST", PROBES, probe, dryRun="All")
    false = {name for name in EXPRESSIONS if re.search(rf"\b{name}\b", answer.message)}
    assert set(EXPRESSIONS) - false == {health}, answer.message
