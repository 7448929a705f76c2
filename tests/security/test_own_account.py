"""Whoever has the operator's token can do with it what the operator does, and nothing else: the
chart's rights and admission policies, on a real API server."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.support.helm_rendering import NAMESPACE, of_kind, render
from conftest import ControlPlane
from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.spec import environment
from finetune_api.status import Restarts
from finetune_operator.core.plan import plan
from finetune_operator.core.pods import manifests
from finetune_operator.core.pods.network_policy import network_policy
from finetune_operator.settings import Settings, parse
from k8s_operator.support.kubelet_stand_in import World
from k8s_operator.support.observed_states import a_job
from k8s_operator.support.operator_process import Operator
from security.support.as_user import User
from security.support.posts import pod_token, post

pytestmark = pytest.mark.cluster

Raw = dict[str, Any]
_RELEASE = "account"
_ACCOUNT = f"{_RELEASE}-finetune-operator"
_USER = f"system:serviceaccount:{NAMESPACE}:{_ACCOUNT}"
_STRICT = ("tenants.claims={shared-*}", "crds.install=false", "rbac.aggregate=false")
_KINDS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding",
          "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")  # fmt: skip


@pytest.fixture(scope="module")
def rendered(helm: str) -> list[Raw]:
    return render(helm, *_STRICT, release=_RELEASE)


@pytest.fixture(scope="module")
def account(crd: ControlPlane, rendered: list[Raw]) -> Iterator[User]:
    """The operator's account, with its rights and the policies that hold it."""
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    crd.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(body))
    objects = yaml.safe_dump_all(of_kind(rendered, *_KINDS))
    crd.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=objects)
    user = User(crd.kubeconfig, _USER)
    for policy, (resource, body) in _probes(rendered).items():  # until the API server knows all of them
        _wait_until_refused(user, World(crd.kubeconfig, "default"), policy, resource, body)
    yield user
    crd.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=objects)


def _probes(rendered: list[Raw]) -> dict[str, tuple[str, Raw]]:
    """Objects that only one of the policies refuses."""
    good = _children(rendered, "default")
    foreign, image, service, policy = (
        copy.deepcopy(good[kind]) for kind in ("jobs", "jobs", "services", "networkpolicies")
    )
    foreign["metadata"]["ownerReferences"] = []
    _template(image)["spec"]["containers"][0]["image"] = "evil"
    service["spec"]["selector"] = {"app": "x"}
    policy["spec"]["podSelector"] = {}
    return {
        "children": ("jobs", foreign),
        "pods": ("jobs", image),
        "services": ("services", service),
        "networkpolicies": ("networkpolicies", policy),
    }


def _wait_until_refused(user: User, world: World, policy: str, resource: str, body: Raw) -> None:
    def refused() -> bool:
        message = user.request("POST", _url(resource, "default"), body, dryRun="All").message
        return f"{_ACCOUNT}-{policy}'" in message

    world.wait(refused, 30, lambda: f"refusal by the policy {policy}")


def _settings(rendered: list[Raw]) -> Settings:
    (config,) = [one for one in of_kind(rendered, "ConfigMap") if "config.yaml" in one["data"]]
    return parse(config["data"]["config.yaml"])


def _children(rendered: list[Raw], namespace: str) -> dict[str, Raw]:
    """What the operator creates for a job of two nodes."""
    settings = _settings(rendered)
    resources = {"gpu": {}, "extra": {"rdma/hca": 1}, "scratchStorageClass": "nvme"}
    output = {"uri": "pvc://shared-results/x"}
    job = a_job(distribution={"nodes": 2}, resources=resources, output=output, pod={"labels": {"team": "a"}})
    job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": namespace})})
    run = plan(job, settings)
    return {
        "jobs": manifests.attempt_job(job, run, settings, Restarts()),
        "check": manifests.preflight_job(job, run, settings),
        "cleanup": manifests.cleanup_job(job, run, settings),
        "services": manifests.service(job),
        "networkpolicies": network_policy(job, settings),
    }


def _url(resource: str, namespace: str) -> str:
    group = {"jobs": "/apis/batch/v1", "networkpolicies": "/apis/networking.k8s.io/v1"}.get(resource, "/api/v1")
    return f"{group}/namespaces/{namespace}/{resource}"


def test_the_children_of_a_job_are_admitted(account: User, rendered: list[Raw], world: World) -> None:
    for kind, body in _children(rendered, world.namespace).items():
        resource = "jobs" if kind in ("check", "cleanup") else kind
        answer = account.request("POST", _url(resource, world.namespace), body, dryRun="All")
        assert answer.accepted, answer.message


Change = Callable[[Raw, Raw, Raw], Any]  # of the object, its pod's spec and its container


def _template(body: Raw) -> Raw:
    template: Raw = body["spec"]["template"]
    return template


def _named(container: Raw, name: str) -> Raw:
    variable: Raw = next(entry for entry in container["env"] if entry["name"] == name)
    return variable


_TOKEN = {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}


def _variable(name: str, value: str) -> Change:
    return lambda o, p, c: c["env"].append({"name": name, "value": value})


def _mount(path: str, **source: Any) -> Change:
    def change(_body: Raw, pod: Raw, container: Raw) -> None:
        pod["volumes"].append({"name": "more", **source})
        container["volumeMounts"] = [m for m in container["volumeMounts"] if m["mountPath"] != path]
        container["volumeMounts"].append({"name": "more", "mountPath": path})

    return change


_CLAIM = {"persistentVolumeClaim": {"claimName": "c"}}
_JOBS: dict[str, tuple[Change, str]] = {
    "other labels": (lambda o, p, c: o["metadata"].update(labels={"app": "x"}), "labels"),
    "no owner": (lambda o, p, c: o["metadata"].pop("ownerReferences"), "owns"),
    "an owner of another kind": (lambda o, p, c: o["metadata"]["ownerReferences"][0].update(kind="Job"), "owns"),
    "another owner's uid": (lambda o, p, c: o["metadata"]["ownerReferences"][0].update(uid="x"), "owns"),
    "another image": (lambda o, p, c: c.update(image="evil"), "image"),
    "an image with the same beginning": (lambda o, p, c: c.update(image=c["image"] + "1"), "image"),
    "another command": (lambda o, p, c: c.update(command=["sh", "-c", "id"]), "only the trainer"),
    "a hook": (lambda o, p, c: c.update(lifecycle={"postStart": {"exec": {"command": ["id"]}}}), "only the trainer"),
    "a library of somebody else": (_variable("LD_PRELOAD", "/mnt/pvc/c/x.so"), "only variables"),
    "modules of somebody else": (_variable("PYTHONPATH", "/mnt/pvc/c"), "only variables"),
    "a variable that names code": (_variable("CUDA_INJECTION64_PATH", "/mnt/pvc/c/x.so"), "only variables"),
    "another home": (lambda o, p, c: _named(c, "HOME").update(value="/mnt/pvc/c"), "only variables"),
    "modules from the working directory": (
        lambda o, p, c: c["env"].remove(_named(c, "PYTHONSAFEPATH")), "only variables"),
    "a variable of a Secret": (
        lambda o, p, c: c["env"].append({"name": "NCCL_X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}),
        "only variables"),
    "all variables of a Secret": (lambda o, p, c: c.update(envFrom=[{"secretRef": {"name": "s"}}]), "only variables"),
    "a working directory": (lambda o, p, c: c.update(workingDir="/mnt/pvc/c"), "only variables"),
    "another program in the trainer's place": (_mount("/usr/local/bin", **_CLAIM), "mounted where"),
    "another program by a detour": (_mount("/mnt/pvc/../../usr/local/bin", **_CLAIM), "mounted where"),
    "modules in the home of somebody else": (_mount("/tmp", **_CLAIM), "mounted where"),
    "an image over the system": (_mount("/etc", image={"reference": "evil"}), "mounted where"),
    "a second container": (lambda o, p, c: p["containers"].append({**c, "name": "b", "image": "evil"}), "image"),
    "a sidecar": (lambda o, p, c: p.update(initContainers=[{**c, "name": "b"}]), "sidecars"),
    "a path of the host": (lambda o, p, c: p["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "volumes"),
    "a volume of a server": (
        lambda o, p, c: p["volumes"].append({"name": "h", "nfs": {"server": "s", "path": "/"}}), "volumes"),
    "a token for the API server": (lambda o, p, c: p["volumes"].append(_TOKEN), "no token"),
    "the account's token": (lambda o, p, c: p.update(automountServiceAccountToken=True), "API token"),
    "the host's network": (lambda o, p, c: p.update(hostNetwork=True), "host"),
    "the host's processes": (lambda o, p, c: p.update(hostPID=True), "host"),
    "the host's memory": (lambda o, p, c: p.update(hostIPC=True), "host"),
    "a port of the host": (lambda o, p, c: c["ports"][0].update(hostPort=9400), "restricted"),
    "a node": (lambda o, p, c: p.update(nodeName="control-plane"), "node"),
    "privileges": (
        lambda o, p, c: c["securityContext"].update(privileged=True, allowPrivilegeEscalation=True), "restricted"),
    "a capability": (lambda o, p, c: c["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]), "restricted"),
    "no dropped capabilities": (lambda o, p, c: c["securityContext"].pop("capabilities"), "restricted"),
    "root": (lambda o, p, c: p["securityContext"].update(runAsUser=0, runAsNonRoot=False), "restricted"),
    "root in the container": (lambda o, p, c: c["securityContext"].update(runAsUser=0), "restricted"),
    "no seccomp": (lambda o, p, c: p["securityContext"].update(seccompProfile={"type": "Unconfined"}), "restricted"),
    "no seccomp in the container": (
        lambda o, p, c: c["securityContext"].update(seccompProfile={"type": "Unconfined"}), "restricted"),
    "no AppArmor": (lambda o, p, c: p["securityContext"].update(appArmorProfile={"type": "Unconfined"}), "restricted"),
    "no AppArmor, by annotation": (
        lambda o, p, c: _template(o)["metadata"]["annotations"].update(
            {"container.apparmor.security.beta.kubernetes.io/trainer": "unconfined"}), "AppArmor"),
    "a writable root": (lambda o, p, c: c["securityContext"].update(readOnlyRootFilesystem=False), "restricted"),
    "pods of another job": (
        lambda o, p, c: _template(o)["metadata"]["labels"].update({names.LABEL_JOB_UID: "x"}), "labels of their job"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jobs", "check", "cleanup"])
def test_p1_a_job_that_the_operator_would_not_create_is_refused(
    account: User, rendered: list[Raw], world: World, kind: str
) -> None:
    good = _children(rendered, world.namespace)[kind]
    for case, (change, message) in _JOBS.items():
        body = copy.deepcopy(good)
        pod = _template(body)["spec"]
        if case == "a port of the host" and not pod["containers"][0].get("ports"):
            continue
        change(body, pod, pod["containers"][0])
        answer = account.request("POST", _url("jobs", world.namespace), body, dryRun="All")
        assert answer.code == 422, (case, answer.message)
        assert message in answer.message, (case, answer.message)


@pytest.mark.parametrize("namespace", ["kube-system", "kube-public", "kube-node-lease"])
def test_p1_the_operator_changes_nothing_in_the_clusters_own_namespaces(
    account: User, rendered: list[Raw], namespace: str
) -> None:
    for kind, body in _children(rendered, namespace).items():
        resource = "jobs" if kind in ("check", "cleanup") else kind
        answer = account.request("POST", _url(resource, namespace), body, dryRun="All")
        assert "excludedNamespaces" in answer.message, (kind, answer.message)


_SERVICES: dict[str, tuple[Callable[[Raw], Any], str]] = {
    "an address of its own": (lambda s: s.pop("clusterIP"), "headless"),
    "an address outside": (lambda s: s.update(externalIPs=["192.0.2.1"]), "headless"),
    "a port of every node": (lambda s: (s.pop("clusterIP"), s.update(type="NodePort")), "headless"),
    "another name": (
        lambda s: (s.clear(), s.update(type="ExternalName", externalName="evil.example")), "headless"),
    "other pods": (lambda s: s.update(selector={"app": "postgres"}), "select only pods"),
    "pods of another job": (lambda s: s["selector"].update({names.LABEL_JOB_UID: "x"}), "select only pods"),
}  # fmt: skip


def test_p1_a_service_of_other_pods_or_with_an_address_is_refused(
    account: User, rendered: list[Raw], world: World
) -> None:
    children = _children(rendered, world.namespace)
    for case, (change, message) in _SERVICES.items():
        body = copy.deepcopy(children["services"])
        change(body["spec"])
        answer = account.request("POST", _url("services", world.namespace), body, dryRun="All")
        assert message in answer.message, (case, answer.message)
    policy = copy.deepcopy(children["networkpolicies"])
    for selector in ({}, {"matchLabels": {"app": "postgres"}}, {"matchLabels": {names.LABEL_JOB_UID: "x"}}):
        policy["spec"]["podSelector"] = selector
        answer = account.request("POST", _url("networkpolicies", world.namespace), policy, dryRun="All")
        assert "select only pods" in answer.message, (selector, answer.message)


def test_p1_jobs_of_others_cannot_be_changed_or_deleted(account: User, rendered: list[Raw], world: World) -> None:
    foreign = copy.deepcopy(_children(rendered, world.namespace)["jobs"])
    foreign["metadata"] |= {"name": "backup", "labels": {"app": "backup"}, "ownerReferences": []}
    foreign["spec"]["suspend"] = True
    world.create("jobs", foreign)
    url = _url("jobs", world.namespace) + "/backup"
    for body in (
        {"spec": {"suspend": False}},
        {"metadata": {key: _children(rendered, world.namespace)["jobs"]["metadata"][key]
                      for key in ("labels", "ownerReferences")}},
    ):  # fmt: skip
        answer = account.request("PATCH", url, body, "application/merge-patch+json", dryRun="All")
        assert answer.code == 422, answer.message
    for path in (url, _url("jobs", world.namespace)):
        answer = account.request("DELETE", path, {"apiVersion": "v1", "kind": "DeleteOptions"})
        assert answer.code in (403, 422), answer.message
    assert world.get("jobs", "backup")


_FINETUNEJOBS: dict[str, tuple[Raw, bool]] = {
    "its finalizer": ({"metadata": {"finalizers": ["example.com/own", names.FINALIZER]}}, True),
    "nothing": ({"metadata": {"finalizers": ["example.com/own"]}}, True),
    "a finalizer of somebody else": ({"metadata": {"finalizers": []}}, False),
    "another finalizer": ({"metadata": {"finalizers": ["example.com/own", "example.com/more"]}}, False),
    "a label": ({"metadata": {"labels": {"a": "b"}}}, False),
    "an annotation": ({"metadata": {"annotations": {"a": "b"}}}, False),
    "an owner": ({"metadata": {"ownerReferences": [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "u"}]}}, False),
    "no owner": ({"metadata": {"ownerReferences": []}}, False),
    "the spec": ({"spec": {"runPolicy": {"suspend": True}}}, False),
}  # fmt: skip


def test_p1_of_a_job_itself_only_the_operators_finalizer_can_be_changed(account: User, world: World) -> None:
    world.submit("theirs")
    world.submit("owner")  # one that exists, or the garbage collector deletes what it owns
    uid = world.get("finetunejobs", "owner")["metadata"]["uid"]  # type: ignore[index]
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "owner", "uid": uid}
    world.patch("finetunejobs", "theirs", {"metadata": {"ownerReferences": [owner]}})
    world.patch("finetunejobs", "theirs", {"metadata": {"finalizers": ["example.com/own"]}})
    url = world.path("finetunejobs", "theirs")
    for case, (body, accepted) in _FINETUNEJOBS.items():
        answer = account.request("PATCH", url, body, "application/merge-patch+json", dryRun="All")
        assert answer.accepted == accepted, (case, answer.message)
        assert accepted or "except its status and its own finalizer" in answer.message, (case, answer.message)
    world.patch("finetunejobs", "theirs", {"metadata": {"finalizers": []}})


def test_p1_the_policies_know_the_variables_that_jobs_may_set(rendered: list[Raw]) -> None:
    (policy,) = [
        one for one in of_kind(rendered, "ValidatingAdmissionPolicy") if one["metadata"]["name"].endswith("-pods")
    ]
    rules = "\n".join(entry["expression"] for entry in policy["spec"]["validations"])
    for pattern in (environment._ALLOWED, environment._REFUSED):
        assert f"'{pattern}'" in rules


_SIDECAR = """
pods:
  networkProfiles:
    fast:
      sidecars: [{name: daemon, image: daemon:1, command: [/run], args: [-v], securityContext: {privileged: true}}]
      volumes: [{name: socket, mountPath: /run/fast, source: {hostPath: {path: /run/fast}}}]
"""


def test_p1_a_sidecar_runs_its_own_program_only(helm: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(_SIDECAR)
    policies = of_kind(render(helm, values=tmp_path / "values.yaml"), "ValidatingAdmissionPolicy")
    rules = [entry["expression"] for one in policies for entry in one["spec"]["validations"]]
    (sidecars,) = [rule for rule in rules if rule.startswith("variables.sidecars")]
    for part in ('c.image == "daemon:1"', '== ["/run"]', '== ["-v"]', "c.securityContext.privileged) == true"):
        assert part in sidecars
    assert any('"/run/fast"' in rule for rule in rules)


def _kubeconfig(crd: ControlPlane, folder: Path) -> Path:
    token = crd.kubectl("-n", NAMESPACE, "create", "token", _ACCOUNT).strip()
    config = yaml.safe_load(crd.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    file = folder / "account.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _used(log: Path, beginning: int) -> tuple[set[tuple[str, str]], list[str]]:
    """What the account has used of its rights since `beginning`, and what it was refused."""
    used, refused = set(), []
    with log.open() as lines:
        lines.seek(beginning)
        for line in lines:
            if _USER not in line or not line.endswith("\n"):
                continue
            event = json.loads(line)
            if event["user"]["username"] != _USER or event["stage"] not in ("ResponseComplete", "ResponseStarted"):
                continue
            target = event.get("objectRef", {})
            resource = "/".join(filter(None, (target.get("resource", ""), target.get("subresource", ""))))
            used.add((resource, event["verb"]))
            if event.get("responseStatus", {}).get("code") in (401, 403):
                refused.append(f"{event['verb']} {event['requestURI']}")
    return used, refused


def test_every_right_is_used_and_none_is_missing(
    crd: ControlPlane, account: User, rendered: list[Raw], world: World, tmp_path: Path
) -> None:
    """The operator runs with the account's token through what a job can meet."""
    assert crd.audit_log is not None
    beginning = crd.audit_log.stat().st_size
    lease = {"enabled": True, "namespace": NAMESPACE, "name": _ACCOUNT}
    settings = json.loads(json.dumps({key: _settings(rendered).to_json()[key] for key in ("tenants", "trainerImage")}))
    one = Operator(_kubeconfig(crd, tmp_path), tmp_path, (world.namespace,), leader_election=lease, **settings)
    one.start()
    try:
        _live_through(world, one)
    finally:
        one.stop()
    used, refused = _used(crd.audit_log, beginning)
    assert refused == []
    rights = {
        (resource, verb)
        for role in of_kind(rendered, "ClusterRole", "Role")
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    # The admission plugin OwnerReferencesPermissionEnforcement asks for this right.
    assert rights - used == {("finetunejobs/finalizers", "update")}


def _live_through(world: World, operator: Operator) -> None:
    """A job's account and claim get their labels, a group is released, a child has another owner,
    a pod loses its labels, and a job restarts."""
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    world.create(
        "persistentvolumeclaims",
        {"metadata": {"name": "results", "labels": {names.LABEL_USE: "output"}}, "spec": claim},
    )
    world.create("serviceaccounts", {"metadata": {"name": "trainer"}})
    run_policy = {"schedulingTimeoutSeconds": 1}
    world.submit(
        "train", output={"uri": "pvc://results/x", "deletionPolicy": "Delete"}, pod={"serviceAccountName": "trainer"},
        distribution={"nodes": 2}, run_policy=run_policy,
    )  # fmt: skip
    world.wait(lambda: "finalizers" in world.get("finetunejobs", "train")["metadata"])  # type: ignore[index]
    world.patch("finetunejobs", "train", {"spec": {"output": {"deletionPolicy": "Retain"}}})
    world.wait(lambda: "finalizers" not in world.get("finetunejobs", "train")["metadata"])  # type: ignore[index]
    world.wait(lambda: "spec.pod.serviceAccountName" in world.status("train").get("message", ""))
    world.patch("serviceaccounts", "trainer", {"metadata": {"labels": {names.LABEL_USE: "training"}}})
    (pod, _) = world.wait_pods("train-1", 2, 30)
    world.bind(pod)
    world.wait(lambda: world.get("jobs", "train-1")["spec"].get("suspend"), 60)  # type: ignore[index]
    _restart_and_suspend(world, operator)


def _restart_and_suspend(world: World, operator: Operator) -> None:
    taken = {"metadata": {"name": "taken-1"}, "spec": {"suspend": True, "template": {"spec": {
        "restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}}  # fmt: skip
    world.create("jobs", taken)
    world.submit("taken")
    world.wait_phase("taken", "Failed")
    world.submit("waits")
    (pod,) = world.wait_pods("waits-1")
    world.waiting_container(pod, "ContainerCreating", "")
    world.warn(pod, "FailedMount", 'MountVolume.SetUp failed: secret "s3" not found')
    world.wait(lambda: "s3" in world.status("waits").get("message", ""), 30)
    world.submit("again", distribution={"nodes": 2})
    pods = world.run_pods("again-1", 2)
    assert post(operator, pod_token(world, pods[0]), {"attempt": 1, "phase": "training"}) == 200
    unlabeled = {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}}
    assert world.patch("pods", pods[0]["metadata"]["name"], unlabeled).accepted
    for pod in pods:
        world.end_pod(pod, 1, Result(outcome="failed", reason="TrainingFailed", message="x"))
    world.run_pods("again-2", 2)
    world.suspend("again")
    world.wait(lambda: (world.get("jobs", "again-2") or {"metadata": {}})["metadata"].get("deletionTimestamp"), 30)
    world.leave("again-2")
    world.wait_phase("again", "Suspended", 30)
    world.suspend("again", False)
    world.run_pods("again-3", 2)
    world.suspend("again")
    world.wait(lambda: (world.get("jobs", "again-3") or {"metadata": {}})["metadata"].get("deletionTimestamp"), 30)
    world.leave("again-3")
    world.wait_phase("again", "Suspended", 30)
