"""The chart on a real API server: everything is admitted, a real helm installs, upgrades and
uninstalls it, and the operator works with exactly the rights that it gets. There is no node: pods
are created and stay Pending."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.support.spec_cases import MINIMAL, changed
from chart.support.helm_rendering import CHART, NAMESPACE, RELEASE, of_kind, render, run
from conftest import ROOT, ControlPlane

pytestmark = pytest.mark.cluster

USER = f"system:serviceaccount:{NAMESPACE}:finetune-operator"
JOB_NAMESPACE = "chart-jobs"


def ensure_namespace(control_plane: ControlPlane, name: str) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(body))


@pytest.fixture(scope="module")
def installed(crd: ControlPlane, helm: str) -> Iterator[ControlPlane]:
    """The installed release, in a namespace that admits only restricted pods."""
    for name in (NAMESPACE, JOB_NAMESPACE):
        ensure_namespace(crd, name)
    helm_run(crd, helm, "upgrade", "--install", RELEASE, str(CHART), "--take-ownership")
    yield crd
    helm_run(crd, helm, "uninstall", RELEASE, "--ignore-not-found")
    crd.kubectl("delete", "namespace", JOB_NAMESPACE, "--wait=false")


def helm_run(control_plane: ControlPlane, helm: str, *arguments: str) -> str:
    done = run(helm, *arguments, "--namespace", NAMESPACE, "--kubeconfig", str(control_plane.kubeconfig))
    assert done.returncode == 0, done.stderr
    return done.stdout


def eventually(holds: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Return the first true value of `holds`. Fails if there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return value


@pytest.mark.parametrize(
    "sets",
    [("networkPolicy.enabled=true",), ("watchNamespaces={default}", "progress.enabled=false")],
    ids=["all", "some"],
)
def test_the_api_server_admits_everything_that_is_rendered(crd: ControlPlane, helm: str, sets: tuple[str, ...]) -> None:
    ensure_namespace(crd, NAMESPACE)
    objects = render(helm, *sets, "crds.keep=false", release="dry")
    command = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-")
    answer = crd.kubectl(*command, stdin=yaml.safe_dump_all(objects))
    assert answer.count("serverside-applied") == len(objects)


def test_pod_security_admits_the_operators_pods(installed: ControlPlane) -> None:
    def pods() -> list[dict[str, Any]]:
        answer = installed.kubectl(
            "-n", NAMESPACE, "get", "pods", "-l", "app.kubernetes.io/component=operator", "-ojson"
        )
        items: list[dict[str, Any]] = json.loads(answer)["items"]
        return items if len(items) == 2 else []

    eventually(pods, "two pods of the operator")


@pytest.mark.parametrize(
    ("verb", "resource", "allowed"),
    [
        ("watch", "finetunejobs.finetune-operator.io", True),
        ("patch", "finetunejobs.finetune-operator.io/status", True),
        ("create", "jobs.batch", True),
        ("delete", "jobs.batch", True),
        ("create", "tokenreviews.authentication.k8s.io", True),
        ("patch", "finetunejobs.finetune-operator.io", True),  # one finalizer, says an admission policy
        ("update", "finetunejobs.finetune-operator.io", False),
        ("delete", "finetunejobs.finetune-operator.io", False),
        ("get", "secrets", False),
        ("list", "secrets", False),
        ("create", "pods", False),
        ("delete", "pods", False),
        ("get", "configmaps", False),
        ("create", "pods/exec", False),
        ("list", "nodes", False),
        ("create", "rolebindings.rbac.authorization.k8s.io", False),
    ],
)
def test_the_operator_may_do_this_much_and_no_more(
    installed: ControlPlane, verb: str, resource: str, allowed: bool
) -> None:
    resource, _, subresource = resource.partition("/")
    arguments = ["auth", "can-i", verb, resource, "-n", JOB_NAMESPACE, f"--as={USER}"]
    arguments += [f"--subresource={subresource}"] if subresource else []
    answer = installed.kubectl(*arguments, check=False).split()
    assert ("yes" in answer) is allowed


def test_users_who_may_edit_a_namespace_may_create_jobs_there(installed: ControlPlane) -> None:
    for role, verb, allowed in (("edit", "create", True), ("view", "list", True), ("view", "create", False)):
        installed.kubectl("-n", JOB_NAMESPACE, "create", "rolebinding", f"{role}-{verb}", f"--clusterrole={role}",
                          f"--user={role}-{verb}")  # fmt: skip

        def may(role: str = role, verb: str = verb) -> bool:
            answer = installed.kubectl(
                "auth", "can-i", verb, "finetunejobs", "-n", JOB_NAMESPACE, f"--as={role}-{verb}", check=False
            )
            return "yes" in answer.split()

        assert eventually(lambda: may() is allowed, f"{role} may {verb}: {allowed}")  # noqa: B023


@contextmanager
def operator_as_its_service_account(control_plane: ControlPlane, folder: Path, helm: str) -> Iterator[Path]:
    """Run the real operator with the chart's settings and only the token of the chart's
    ServiceAccount."""
    token = control_plane.kubectl("-n", NAMESPACE, "create", "token", "finetune-operator").strip()
    kubeconfig = yaml.safe_load(control_plane.kubeconfig.read_text())
    kubeconfig["users"][0]["user"] = {"token": token}
    (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    (config,) = of_kind(render(helm), "ConfigMap")
    settings = yaml.safe_load(config["data"]["config.yaml"])
    settings |= {"metricsPort": 0, "probesPort": 0}
    settings["progress"] |= {"port": 0, "certificate": ""}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "finetune_operator", "--config", str(folder / "config.yaml")]
    command += ["--kubeconfig", str(folder / "kubeconfig")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "operator"), "POD_NAMESPACE": NAMESPACE}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield folder / "log"
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
    finally:
        process.terminate()
        process.wait(30)


def test_the_operator_works_with_the_charts_rights(installed: ControlPlane, helm: str, tmp_path: Path) -> None:
    """A job has two nodes and is suspended, resumed and deleted. The audit log contains no
    refusal."""
    assert installed.audit_log is not None
    beginning = installed.audit_log.stat().st_size
    job = changed(
        MINIMAL, ("metadata", {"name": "rights", "namespace": JOB_NAMESPACE}), ("distribution", {"nodes": 2}),
        ("model.uri", "pvc://claim/model"),
    )  # fmt: skip

    def get(kind: str, name: str, path: str) -> str:
        command = ("-n", JOB_NAMESPACE, "get", kind, name, "-o", f"jsonpath={{{path}}}", "--ignore-not-found")
        return installed.kubectl(*command)

    with operator_as_its_service_account(installed, tmp_path, helm) as log:
        installed.kubectl("apply", "-f", "-", stdin=json.dumps(job))
        eventually(lambda: get("job", "rights-1", ".metadata.name"), f"a first attempt\n{log.read_text()[-2000:]}")
        eventually(lambda: get("service", "rights-ranks", ".metadata.name"), "a Service")
        eventually(lambda: get("ftj", "rights", ".status.observedGeneration") == "1", "a status")
        installed.kubectl(
            "-n",
            JOB_NAMESPACE,
            "patch",
            "ftj",
            "rights",
            "--type=merge",
            "-p",
            '{"spec":{"runPolicy":{"suspend":true}}}',
        )
        eventually(lambda: not get("job", "rights-1", ".metadata.name"), "the attempt's end")
        eventually(lambda: get("ftj", "rights", ".status.phase") == "Suspended", "Suspended")
        installed.kubectl(
            "-n",
            JOB_NAMESPACE,
            "patch",
            "ftj",
            "rights",
            "--type=merge",
            "-p",
            '{"spec":{"runPolicy":{"suspend":false}}}',
        )
        eventually(lambda: get("job", "rights-2", ".metadata.name"), "a second attempt")
        installed.kubectl("-n", JOB_NAMESPACE, "delete", "ftj", "rights")
        time.sleep(1)  # time for the operator's reaction to a deleted job; the garbage collector may take a minute
    entries = audited(installed.audit_log, beginning)
    refused = [
        (entry["verb"], entry["requestURI"], entry["responseStatus"]["code"])
        for entry in entries
        if entry["responseStatus"].get("code") in (401, 403)
    ]
    assert refused == []
    done = {(entry["verb"], entry.get("objectRef", {}).get("resource")) for entry in entries}
    assert {("create", "jobs"), ("create", "services"), ("patch", "finetunejobs"), ("create", "leases")} <= done


def audited(log: Path, beginning: int) -> list[dict[str, Any]]:
    """Return the operator's requests that the API server has answered since `beginning`."""
    with log.open() as lines:
        lines.seek(beginning)
        entries = [json.loads(line) for line in lines if USER in line and line.endswith("\n")]
    return [entry for entry in entries if entry["stage"] == "ResponseComplete" and entry["user"]["username"] == USER]


def certificate(control_plane: ControlPlane) -> dict[str, str]:
    """Return the data of the Secret with the operator's certificate."""
    answer = control_plane.kubectl("-n", NAMESPACE, "get", "secret", f"{RELEASE}-progress-tls", "-ojson")
    data: dict[str, str] = json.loads(answer)["data"]
    return data


def test_an_upgrade_keeps_jobs_and_an_uninstall_keeps_them_too(installed: ControlPlane, helm: str) -> None:
    job = changed(MINIMAL, ("metadata", {"name": "kept", "namespace": JOB_NAMESPACE}), ("runPolicy.suspend", True))
    installed.kubectl("apply", "-f", "-", stdin=json.dumps(job))
    before = certificate(installed)
    helm_run(installed, helm, "upgrade", RELEASE, str(CHART), "--set", "replicaCount=1")
    after = certificate(installed)
    assert (after["ca.crt"], after["ca.key"]) == (before["ca.crt"], before["ca.key"]), "running pods know it"
    assert after["tls.crt"] != before["tls.crt"]
    for _ in range(2):
        helm_run(installed, helm, "upgrade", RELEASE, str(CHART), "--set", "progress.tls.authority=2")
        rotated = certificate(installed)
        assert (rotated["former-ca.crt"], rotated["former-ca.key"]) == (before["ca.crt"], before["ca.key"])
        assert rotated["ca.crt"] != before["ca.crt"]
    helm_run(installed, helm, "uninstall", RELEASE)
    assert "kept" in installed.kubectl("-n", JOB_NAMESPACE, "get", "ftj", "-o", "name")
    assert "No resources" in installed.kubectl("-n", NAMESPACE, "get", "deployments", check=False)
    helm_run(installed, helm, "install", RELEASE, str(CHART), "--take-ownership")
    assert "kept" in installed.kubectl("-n", JOB_NAMESPACE, "get", "ftj", "-o", "name")


def test_the_notes_explain_how_to_begin(installed: ControlPlane, helm: str) -> None:
    notes = helm_run(installed, helm, "get", "notes", RELEASE)
    assert "all namespaces" in notes
    assert "kubectl -n ml-team create secret generic s3" in notes
    claim, job = yaml.safe_load_all(notes.split("<<'END'\n")[1].split("\nEND\n")[0])
    assert claim["kind"] == "PersistentVolumeClaim"
    assert job["spec"]["output"]["uri"] == f"pvc://{claim['metadata']['name']}/result"
