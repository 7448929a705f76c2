"""What one tenant, editor or pod does on a real API server never stops the operator, and never
shows in another job's status, metrics or pods."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api import names
from finetune_api.messages.result import Result
from k8s_operator.support.kubelet_stand_in import Raw, World
from k8s_operator.support.operator_process import Operator
from security.support.posts import pod_token, post

pytestmark = pytest.mark.cluster

_MANAGED = {"app.kubernetes.io/managed-by": "finetune-operator"}
_SERVED_SECONDS = 1.0
_CONTAINERS = {"containers": [{"name": "trainer", "image": "i"}]}


@pytest.fixture
def elsewhere(crd: Any, world: World) -> Iterator[World]:
    """Another namespace, of an attacker, which the operator watches too."""
    other = World(crd.kubeconfig, f"{world.namespace}-b")
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other.namespace}}
    assert other.request("POST", "/api/v1/namespaces", body).accepted
    other.wait(lambda: other.get("serviceaccounts", "default"))
    yield other
    other.request("DELETE", f"/api/v1/namespaces/{other.namespace}")


@pytest.fixture
def both(crd: Any, world: World, elsewhere: World, tmp_path: Path) -> Iterator[Operator]:
    """An operator of both namespaces."""
    one = Operator(crd.kubeconfig, tmp_path, (world.namespace, elsewhere.namespace))
    one.start()
    yield one
    one.kill()


def _assert_served(world: World, operator: Operator, name: str) -> float:
    """Assert that the operator lives and that a new job of somebody else gets its Job soon."""
    assert operator.is_running, operator.log.read_text()[-3000:]
    started = time.monotonic()
    world.submit(name)
    world.wait_job(f"{name}-1", seconds=10)
    seconds = time.monotonic() - started
    assert operator.is_running, operator.log.read_text()[-3000:]
    return seconds


def _unsigned_token(pod_uid: str, namespace: str) -> str:
    claims = {
        "aud": [names.PROGRESS_AUDIENCE], "exp": time.time() + 600,
        "kubernetes.io": {"namespace": namespace, "pod": {"name": "x", "uid": pod_uid}},
    }  # fmt: skip
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"e30.{part}.{base64.urlsafe_b64encode(str(time.monotonic_ns()).encode()).decode().rstrip('=')}"


def test_t1_a_character_above_uffff_in_any_text_is_shown_and_ends_nothing(world: World, operator: Operator) -> None:
    world.submit("smile", dataset={"uri": "s3://data/sec/train-😀.jsonl"})
    (pod,) = world.wait_pods("smile-1")
    world.waiting_container(pod, "CreateContainerConfigError", "secret 😀\x1b[2J\u202e\u2028 is missing\r\nroot")
    message = world.wait(lambda: "😀" in (m := world.status("smile").get("message", "")) and m)
    assert not set("\x1b\u202e\u2028\r\n") & set(message)
    world.run_pod(pod)
    code = post(
        operator, pod_token(world, pod), {"attempt": 1, "phase": "fetching", "message": "fetching train-😀.jsonl"}
    )
    assert code == 200
    world.wait(lambda: "😀" in (world.status("smile").get("progress") or {}).get("message", ""))
    world.end_pod(pod, 65, Result(outcome="failed", reason="DatasetInvalid", message="no rows in train-😀.jsonl"))
    failure = world.wait_phase("smile", "Failed")["failure"]
    assert "train-😀.jsonl" in failure["message"]
    _assert_served(world, operator, "neighbor")


def test_a_status_that_the_api_server_refuses_costs_its_job_alone(crd: Any, world: World, operator: Operator) -> None:
    policy: Raw = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": world.namespace},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}},
                "resourceRules": [{
                    "apiGroups": [names.GROUP], "apiVersions": ["*"], "operations": ["UPDATE"],
                    "resources": ["finetunejobs/status"],
                }],
            },
            "validations": [{"expression": "!object.status.message.contains('REFUSE-ME')"}],
        },
    }  # fmt: skip
    binding: Raw = {
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": world.namespace},
        "spec": {"policyName": world.namespace, "validationActions": ["Deny"]},
    }  # fmt: skip
    group = "/apis/admissionregistration.k8s.io/v1"
    try:
        for resource, body in (("validatingadmissionpolicies", policy), ("validatingadmissionpolicybindings", binding)):
            assert world.request("POST", f"{group}/{resource}", body).accepted
        probe = world.submit("probe")["metadata"]["name"]
        world.wait(lambda: world.status(probe).get("observedGeneration"))
        world.wait(
            lambda: not world.patch("finetunejobs", probe, {"status": {"message": "REFUSE-ME"}}, "status").accepted
        )
        world.submit("refused")
        (pod,) = world.wait_pods("refused-1")
        world.waiting_container(pod, "CreateContainerConfigError", "REFUSE-ME")
        message = world.wait(
            lambda: "refuses the full status" in (m := world.status("refused").get("message", "")) and m
        )
        assert "422" in message or "403" in message
        assert world.status("refused")["attempt"] == 1
        _assert_served(world, operator, "neighbor")
        world.end_pod(pod, 0)
        world.wait_phase("refused", "Succeeded", seconds=30)
    finally:
        for resource in ("validatingadmissionpolicybindings", "validatingadmissionpolicies"):
            world.request("DELETE", f"{group}/{resource}/{world.namespace}")


def _create_foreign(world: World, name: str, attempt: str) -> None:
    """Create a Job and a pod of somebody else that claim to be the operator's."""
    labels = {**_MANAGED, names.LABEL_ATTEMPT: attempt, names.LABEL_ROLE: "trainer"}
    template = {"metadata": {"labels": labels}, "spec": {**_CONTAINERS, "restartPolicy": "Never"}}
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": labels},
        "spec": {"suspend": True, "completions": 2147483647, "template": template},
    }  # fmt: skip
    world.create("jobs", job)
    index = {"batch.kubernetes.io/job-completion-index": attempt or "x", names.LABEL_JOB_UID: "y"}
    world.create("pods", {"metadata": {"name": name, "labels": {**_MANAGED, **index}}, "spec": _CONTAINERS})


def test_t5_labels_of_foreign_objects_end_nothing(world: World, operator: Operator) -> None:
    for number, attempt in enumerate(("boom", "1e9", "99999999999999999999", "")):
        _create_foreign(world, f"foreign-{number}", attempt)
    time.sleep(1)
    _assert_served(world, operator, "neighbor")
    operator.stop()
    operator.start()
    _assert_served(world, operator, "later")


_POSTS: tuple[tuple[int, Raw], ...] = (
    (400, {"step": 10**30, "totalSteps": 5}),
    (400, {"step": 7, "totalSteps": 3}),
    (400, {"step": -1}),
    (400, {"checkpoint": {"step": 99, "uri": "x", "time": "garbage"}}),
    (400, {"checkpoint": {"step": 2**63, "uri": "x", "time": "2026-01-01T00:00:00Z"}}),
    (400, {"gpus": [{"index": 400}]}),
    (400, {"tokens": 10**400}),
    (400, {"trainLoss": 1e308}),
    (200, {"phase": "\x1b[2J", "message": "x" * 9000}),
    (200, {"gpus": [{"index": n % 16} for n in range(16)] * 10}),
)


def test_t6_t8_t18_a_compromised_trainer_reaches_only_its_own_figures(
    world: World, operators: Callable[..., Operator]
) -> None:
    operator = operators(progress={"writeEverySeconds": 0.2})
    operator.start()
    world.submit("victim")
    (innocent,) = world.run_pods("victim-1")
    assert post(operator, pod_token(world, innocent), {"attempt": 1, "step": 3, "totalSteps": 9}) == 200
    world.submit("evil")
    (pod,) = world.run_pods("evil-1")
    token = pod_token(world, pod)
    for number, (code, body) in enumerate(_POSTS):
        assert post(operator, token, {"attempt": 1, "phase": f"p{number}"} | body) == code, body
        time.sleep(0.5)
    time.sleep(1.2)
    assert operator.samples("finetune_job_step", job="victim") == [3.0]
    text = operator.get(operator.metrics_port, "/metrics")
    assert sum('job="evil"' in line for line in text.splitlines()) < 100
    assert 'phase="p0"' not in text
    _assert_served(world, operator, "neighbor")


def _forged_job(victim: Raw, attempt: int, namespace: str) -> Raw:
    meta = victim["metadata"]
    owner = {
        "apiVersion": names.API_VERSION, "kind": names.KIND, "name": meta["name"], "uid": meta["uid"],
        "controller": True,
    }  # fmt: skip
    labels = {
        **_MANAGED, names.LABEL_ATTEMPT: str(attempt), names.LABEL_ROLE: "trainer", names.LABEL_JOB_UID: meta["uid"],
        names.LABEL_JOB_NAME: meta["name"],
    }  # fmt: skip
    return {
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {
            "name": f"{meta['name']}-{attempt}", "namespace": namespace, "labels": labels, "ownerReferences": [owner],
            "finalizers": ["example.test/stay"],
        },
        "spec": {
            "suspend": True, "template": {
                "metadata": {"labels": labels}, "spec": {**_CONTAINERS, "restartPolicy": "Never"},
            },
        },
    }  # fmt: skip


def test_t2_t4_an_editor_of_another_namespace_can_neither_write_a_result_nor_restart_a_job(
    world: World, elsewhere: World, both: Operator
) -> None:
    victim = world.submit("victim")
    world.run_pods("victim-1")
    world.wait_phase("victim", "Running")
    job = elsewhere.create("jobs", _forged_job(victim, 5000, elsewhere.namespace))
    owner = {
        "apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"],
        "controller": True,
    }  # fmt: skip
    forged = elsewhere.create("pods", {
        "metadata": {
            "name": "forged", "labels": {**job["metadata"]["labels"], "batch.kubernetes.io/job-completion-index": "0"},
            "ownerReferences": [owner], "finalizers": ["example.test/stay"],
        },
        "spec": _CONTAINERS,
    })  # fmt: skip
    elsewhere.bind(forged)
    artifact = {"uri": "s3://evil/backdoored-adapter", "manifestDigest": "sha256:EVIL", "sizeBytes": 666}
    ended = {
        "exitCode": 0, "reason": "Completed", "finishedAt": "2026-01-01T00:00:00Z",
        "message": json.dumps({"outcome": "succeeded", "artifact": artifact}),
    }  # fmt: skip
    container = {
        "name": "trainer", "image": "i", "imageID": "", "ready": False, "restartCount": 0,
        "state": {"terminated": ended},
    }  # fmt: skip
    assert elsewhere.patch(
        "pods", "forged", {"status": {"phase": "Succeeded", "containerStatuses": [container]}}, "status"
    ).accepted
    try:
        world.patch("finetunejobs", "victim", {"metadata": {"annotations": {"x": "1"}}})
        time.sleep(4)
        status = world.status("victim")
        assert (status["phase"], status["attempt"], status.get("artifact")) == ("Running", 1, None)
    finally:
        for kind, name in (("pods", "forged"), ("jobs", "victim-5000")):
            elsewhere.patch(kind, name, {"metadata": {"finalizers": None}})
    time.sleep(3)
    assert [pod["metadata"]["name"][:8] for pod in world.all("pods")] == ["victim-1"]
    assert world.status("victim")["restartsTotal"] == 0


def test_no_attempt_is_created_while_a_pod_of_the_job_lives_whatever_its_labels_say(
    world: World, operator: Operator
) -> None:
    world.submit("twice")
    (pod,) = world.run_pods("twice-1")
    world.wait_phase("twice", "Running")
    labels = {"app.kubernetes.io/managed-by": None, names.LABEL_JOB_UID: "somebody-else"}
    assert world.patch("pods", pod["metadata"]["name"], {"metadata": {"labels": labels}}).accepted
    time.sleep(1)
    world.delete("jobs", "twice-1", propagationPolicy="Orphan")
    world.wait(lambda: world.get("jobs", "twice-1") is None)
    time.sleep(4)
    assert world.get("jobs", "twice-2") is None
    assert operator.is_running
    operator.kill()
    operator.start()
    time.sleep(3)
    assert world.get("jobs", "twice-2") is None
    world.end_pod(pod, 137)
    world.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=0)
    world.wait_job("twice-2", seconds=30)


def test_p8_a_finalizer_of_a_tenant_keeps_no_pods(world: World, operator: Operator) -> None:
    world.submit("stay")
    world.run_pods("stay-1")
    world.wait_phase("stay", "Running")
    world.patch("finetunejobs", "stay", {"metadata": {"finalizers": ["example.test/stay"]}})
    world.delete("finetunejobs", "stay")
    try:
        world.wait(
            lambda: (
                "deletionTimestamp" in (world.get("jobs", "stay-1") or {"metadata": ["deletionTimestamp"]})["metadata"]
            )
        )
        world.leave("stay-1")
    finally:
        world.patch("finetunejobs", "stay", {"metadata": {"finalizers": None}})


@contextlib.contextmanager
def _flood(count: int, work: Callable[[], None]) -> Iterator[list[int]]:
    """Run `work` again and again in threads; yields how often it ended."""
    ended, stop = [0], threading.Event()

    def run() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, urllib.error.URLError):
                work()
            ended[0] += 1

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield ended
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=12)


def _lease(**extra: Any) -> Raw:
    return {"leader_election": {"enabled": True, "leaseSeconds": 15, "renewSeconds": 10, "retrySeconds": 0.5} | extra}


def test_t9_a_flood_of_tokens_costs_neither_the_lease_nor_the_neighbors_anything(
    world: World, operators: Callable[..., Operator]
) -> None:
    operator = operators(limits={"requestsPerSecond": 50, "burst": 50}, **_lease())
    operator.start()
    world.submit("target")
    (pod,) = world.run_pods("target-1")
    uid, url = pod["metadata"]["uid"], operator.progress_port
    posts = iter(range(10**9))

    def work() -> None:
        token = _unsigned_token(uid, world.namespace) if next(posts) % 2 else f"garbage-{next(posts)}"
        request = (
            f"POST {names.PROGRESS_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            "Content-Length: 2\r\nConnection: close\r\n\r\n{}"
        )
        with socket.create_connection(("127.0.0.1", url), timeout=10) as connection:
            connection.sendall(request.encode())
            connection.recv(200)

    with _flood(60, work) as ended:
        started = time.monotonic()
        seconds = [_assert_served(world, operator, f"neighbor-{n}") for n in range(3)]
        time.sleep(max(0.0, 14 - (time.monotonic() - started)))
        seconds.append(_assert_served(world, operator, "neighbor-last"))
    assert ended[0] > 100
    assert sorted(seconds)[1] < 3 * _SERVED_SECONDS, seconds
    assert operator.samples("finetune_operator_leader") == [1.0]
    assert sum(operator.samples("finetune_operator_api_requests_total", resource="tokenreviews")) < 400


def test_t10_many_scrapers_cost_neither_the_lease_nor_the_neighbors_anything(
    world: World, operators: Callable[..., Operator]
) -> None:
    operator = operators(**_lease())
    operator.start()
    for number in range(60):
        world.submit(f"many-{number}", run_policy={"suspend": True})
    world.wait_phase("many-59", "Suspended", seconds=30)

    texts: set[str] = set()

    def work() -> None:
        texts.add(operator.get(operator.metrics_port, "/metrics"))

    started = time.monotonic()
    with _flood(12, work) as ended:
        time.sleep(2)
        seconds = [_assert_served(world, operator, f"neighbor-{n}") for n in range(3)]
    assert ended[0] > 2 * len(texts)
    assert len(texts) <= time.monotonic() - started + 2
    assert sorted(seconds)[1] < 3 * _SERVED_SECONDS, seconds


def test_p7_half_open_connections_are_limited_and_end(world: World, operator: Operator) -> None:
    sockets = [socket.create_connection(("127.0.0.1", operator.progress_port)) for _ in range(200)]
    for each in sockets:
        with contextlib.suppress(OSError):
            each.sendall(b"POST /v1/progress HTTP/1.1\r\nX-Slow: ")
    time.sleep(0.5)
    descriptors = len(list(Path(f"/proc/{operator.pid}/fd").iterdir()))
    assert descriptors < 120
    _assert_served(world, operator, "neighbor")
    deadline = time.monotonic() + 20
    while len(list(Path(f"/proc/{operator.pid}/fd").iterdir())) > 60 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(list(Path(f"/proc/{operator.pid}/fd").iterdir())) <= 60
    for each in sockets:
        each.close()


def test_p5_a_stolen_token_is_of_no_use_at_another_address(world: World, operator: Operator) -> None:
    world.submit("robbed")
    (pod,) = world.run_pods("robbed-1")
    token = pod_token(world, pod)
    addresses = {"podIP": "10.244.7.7", "podIPs": [{"ip": "10.244.7.7"}]}
    assert world.patch("pods", pod["metadata"]["name"], {"status": addresses}, "status").accepted
    time.sleep(1)
    host = _own_address()
    if host is None:
        assert post(operator, token, {"attempt": 1}) == 200
        return
    body = json.dumps({"attempt": 1}).encode()
    with socket.create_connection((host, operator.progress_port), timeout=10) as connection:
        head = f"POST {names.PROGRESS_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        answer = connection.recv(4000).decode()
    assert " 403 " in answer.splitlines()[0]
    assert "10.244.7.7" not in answer


def _own_address() -> str | None:
    """An address of this machine other than the loopback; None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
        except OSError:
            return None
        address = str(probe.getsockname()[0])
        return None if address.startswith("127.") else address
