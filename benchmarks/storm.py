"""Measures what hostile tenants cost the jobs of others.

    python benchmarks/storm.py [--seconds 600] [--honest 20] [--hostile 10]

The benchmark starts its own control plane (real etcd, API server and Job controller; no nodes) and
runs the unmodified operator with a Lease and the account of a pod. It creates honest jobs, whose
pods it plays to their end, evenly over the time: in calm, and beside tenants who flood the API
server and the operator with jobs, tokens, connections, scrapes, and forged Jobs and pods. It
compares the times until the pods exist, and writes benchmarks/results/storm.json.

Each tenant is a user and a process of its own, with an own address on loopback and the lowest
priority, since the attackers of a real cluster compute on other machines.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "hack"), str(ROOT / "tests"), str(ROOT / "operator")]

from operator_latency import Watch  # noqa: E402

import localcluster  # noqa: E402
from api.support.api_server import Answer, Server  # noqa: E402
from finetune_api import names  # noqa: E402
from finetune_api.messages.result import Result  # noqa: E402
from finetune_api.status import ArtifactStatus  # noqa: E402
from k8s_operator.support.kubelet_stand_in import SPEC, World, job_body  # noqa: E402
from k8s_operator.support.operator_process import Operator  # noqa: E402
from security.support.as_user import User  # noqa: E402

Raw = dict[str, Any]
_FORK = multiprocessing.get_context("fork")
_AIM = 2.0  # how much longer the slowest honest jobs may wait in the storm
_MOST_MEMORY_GROWTH = 1.15  # of the operator, from the first half of the storm to the second
_ACCOUNT = "finetune-operator"


class Tenant(World):
    """A namespace, as somebody sees it who has all rights in there and none elsewhere."""

    def __init__(self, kubeconfig: Path, namespace: str, number: int = 0) -> None:
        super().__init__(kubeconfig, namespace)
        self.address = f"127.0.0.{number + 10}"
        self._user = User(kubeconfig, namespace)

    def request(
        self, method: str, path: str, body: Any = None, content: str = "application/json", **query: str
    ) -> Answer:
        """Sends a request once. After an OSError or HTTPException, the next one connects again."""
        try:
            return self._user.request(method, path, body, content, **query)
        except (OSError, http.client.HTTPException):
            self._user = User(self._kubeconfig, self.namespace)
            raise


class Storm:
    """The hostile tenants. Each has one kind of attack."""

    def __init__(self, kubeconfig: Path, operator: Operator, victim: Raw) -> None:
        self._kubeconfig = kubeconfig
        self._operator = operator
        self._victim = victim["metadata"]
        self._stop = _FORK.Event()
        self._counts: list[tuple[str, Synchronized[int]]] = []
        self._processes: list[Any] = []
        self.attacks: tuple[Callable[[Tenant, int], None], ...] = (
            self.jobs, self.strange_specs, self.invented_tokens, self.unsigned_tokens, self.half_open_connections,
            self.scrapes, self.forged_jobs, self.forged_pods, self.bad_bodies, self.suspensions,
        )  # fmt: skip

    def start(self, count: int) -> None:
        """Starts one process per tenant."""
        for number in range(count):
            attack = self.attacks[number % len(self.attacks)]
            done: Synchronized[int] = _FORK.Value("i", 0)
            self._counts.append((attack.__name__, done))
            process = _FORK.Process(target=self._repeat, args=(attack, number, done), daemon=True)
            self._processes.append(process)
            process.start()

    def stop(self) -> dict[str, int]:
        """Ends all attacks. Returns how often each was carried out."""
        self._stop.set()
        for process in self._processes:
            process.join(timeout=30)
            process.kill()
        counts: Counter[str] = Counter()
        for name, done in self._counts:
            counts[name] += done.value
        return dict(counts)

    def _repeat(self, attack: Callable[[Tenant, int], None], number: int, done: Synchronized[int]) -> None:
        os.nice(19)
        tenant = Tenant(self._kubeconfig, f"tenant-{number}", number)
        while not self._stop.is_set():
            with contextlib.suppress(OSError, AssertionError, http.client.HTTPException, ValueError):
                attack(tenant, done.value)
            done.value += 1

    def jobs(self, tenant: Tenant, number: int) -> None:
        """Creates jobs, and deletes each after a hundred others."""
        tenant.request("POST", tenant.path(names.PLURAL), job_body(f"flood-{number}"))
        tenant.delete(names.PLURAL, f"flood-{number - 100}")

    def strange_specs(self, tenant: Tenant, number: int) -> None:
        """Creates jobs whose texts are long or have characters that some parsers refuse."""
        data = {"uri": f"s3://data/train-😀{'x' * (number % 900)}.jsonl"}
        tenant.request("POST", tenant.path(names.PLURAL), job_body(f"strange-{number % 50}", dataset=data))
        tenant.delete(names.PLURAL, f"strange-{(number + 25) % 50}")

    def suspensions(self, tenant: Tenant, number: int) -> None:
        """Suspends and resumes one job as fast as possible."""
        tenant.request("POST", tenant.path(names.PLURAL), job_body("swing"))
        tenant.patch(names.PLURAL, "swing", {"spec": {"runPolicy": {"suspend": number % 2 == 0}}})

    def forged_jobs(self, tenant: Tenant, number: int) -> None:
        """Creates Jobs that claim to be attempts of an honest job."""
        labels = {"app.kubernetes.io/managed-by": "finetune-operator", names.LABEL_JOB_UID: self._victim["uid"],
                  names.LABEL_ROLE: "trainer", names.LABEL_ATTEMPT: ("5000", "boom")[number % 2]}  # fmt: skip
        spec = {"suspend": True, "completions": 2**31 - 1, "parallelism": 1, "template": {"spec": _pod_spec()}}
        name = f"forged-{number % 30}"
        meta = {"name": name, "labels": labels, "ownerReferences": [self._owner()]}
        tenant.request("POST", tenant.path("jobs"), {"metadata": meta, "spec": spec})
        tenant.delete("jobs", f"forged-{(number + 15) % 30}", propagationPolicy="Background")

    def forged_pods(self, tenant: Tenant, number: int) -> None:
        """Creates pods with the labels of an honest job's pods."""
        labels = {"app.kubernetes.io/managed-by": "finetune-operator", names.LABEL_JOB_UID: self._victim["uid"],
                  names.LABEL_ROLE: "trainer", "batch.kubernetes.io/job-completion-index": "boom"}  # fmt: skip
        name = f"forged-{number % 30}"
        meta = {"name": name, "labels": labels, "ownerReferences": [self._owner()]}
        tenant.request("POST", tenant.path("pods"), {"metadata": meta, "spec": _pod_spec()})
        tenant.delete("pods", f"forged-{(number + 15) % 30}", gracePeriodSeconds=0)

    def invented_tokens(self, tenant: Tenant, number: int) -> None:
        """Posts with tokens that are none."""
        self._post(tenant, f"garbage-{number}", b"{}")

    def unsigned_tokens(self, tenant: Tenant, number: int) -> None:
        """Posts with tokens that claim to be of a pod."""
        claims = {"aud": [names.PROGRESS_AUDIENCE], "exp": time.time() + 600,
                  "kubernetes.io": {"namespace": "honest", "pod": {"name": "x", "uid": str(number)}}}  # fmt: skip
        part = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
        self._post(tenant, f"e30.{part}.c2ln", b"{}")

    def bad_bodies(self, tenant: Tenant, number: int) -> None:
        """Posts long, nested and compressed bodies."""
        self._post(tenant, "x", (b"[" * 15000, b"\x1f\x8b" * 8000, b"x" * 200000)[number % 3])

    def half_open_connections(self, tenant: Tenant, _number: int) -> None:
        """Opens connections and says nothing."""
        ports = (self._operator.progress_port, self._operator.metrics_port)
        with contextlib.ExitStack() as stack:
            for port in ports * 30:
                stack.enter_context(_connection(tenant, port))
            time.sleep(0.5)

    def scrapes(self, tenant: Tenant, _number: int) -> None:
        """Reads the metrics."""
        with _connection(tenant, self._operator.metrics_port) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while connection.recv(1 << 16):
                pass

    def _post(self, tenant: Tenant, token: str, body: bytes) -> None:
        head = (f"POST {names.PROGRESS_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")  # fmt: skip
        with _connection(tenant, self._operator.progress_port) as connection:
            connection.sendall(head.encode() + body)
            connection.recv(4096)

    def _owner(self) -> Raw:
        return {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": self._victim["name"],
                "uid": self._victim["uid"], "controller": True}  # fmt: skip


def _connection(tenant: Tenant, port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(tenant.address, 0))


def _pod_spec() -> Raw:
    return {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "i"}]}


@dataclass
class HonestJobs:
    """Jobs that somebody creates one after another, and whose pods train and succeed."""

    tenant: World  # who creates them
    world: World  # who plays the kubelet
    pods: dict[str, tuple[float, Raw]] = field(default_factory=dict)  # when each Job's first pod was seen
    wrong: list[str] = field(default_factory=list)

    def __call__(self, event: Raw, now: float) -> None:
        """Records an event of a watch of pods."""
        if event["type"] == "ADDED":
            job = event["object"]["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            self.pods.setdefault(job, (now, event["object"]))

    def run(self, count: int, seconds: float, prefix: str) -> list[float]:
        """Creates jobs evenly over the time. Returns the seconds until the pod of each existed."""
        begin, waited = time.monotonic(), []
        for number in range(count):
            time.sleep(max(0.0, begin + number * seconds / count - time.monotonic()))
            name, started = f"{prefix}-{number}", time.monotonic()
            self.tenant.submit(name)
            appeared, pod = self.world.wait(
                lambda job=f"{name}-1": self.pods.get(job), 60, lambda name=name: f"pod of {name}"
            )
            waited.append(appeared - started)
            self.world.run_pod(pod)
            artifact = ArtifactStatus(uri=SPEC["output"]["uri"], manifest_digest=name, size_bytes=1)
            self.world.end_pod(pod, result=Result(outcome="succeeded", artifact=artifact))
        time.sleep(max(0.0, begin + seconds - time.monotonic()))
        return waited

    def check(self, names_of_jobs: list[str]) -> None:
        """Notes every job whose status isn't that of what its pod did."""
        for name in names_of_jobs:
            status = self.world.status(name)
            facts = (status.get("phase"), status.get("attempt"), status.get("artifact", {}).get("manifestDigest"))
            if facts != ("Succeeded", 1, name) or "failure" in status:
                self.wrong.append(f"{name}: {json.dumps(status)[:500]}")


def _memory(pid: int) -> float:
    """Returns the resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024, 1)


def _figures(waited: list[float]) -> Raw:
    """Returns quantiles in seconds; that of 99 % is the longest of at most 100."""
    ordered = sorted(waited)
    quantiles = {f"p{q}": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 3) for q in (50, 90, 99)}
    return {"jobs": len(ordered), **quantiles}


def _prepare(server: Server, namespaces: list[str]) -> None:
    """Creates namespaces, each with a user who has all rights in it."""
    for name in namespaces:
        body: Raw = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        server.request("POST", "/api/v1/namespaces", body)
        _bind(server, f"namespaces/{name}/rolebindings", {"kind": "User", "name": name})


def _bind(server: Server, path: str, subject: Raw) -> None:
    """Gives all rights to somebody, in a namespace or in the cluster."""
    kind = "RoleBinding" if path.startswith("namespaces") else "ClusterRoleBinding"
    body = {
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": subject["name"]},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [subject],
    }  # fmt: skip
    answer = server.request("POST", f"/apis/rbac.authorization.k8s.io/v1/{path}", body)
    assert answer.accepted, answer.message


def _account(server: Server, kubeconfig: Path, folder: Path) -> Path:
    """Returns a kubeconfig of a service account: the API server shares its time among
    service accounts and users, but not with administrators."""
    accounts = "/api/v1/namespaces/default/serviceaccounts"
    server.request("POST", accounts, {"metadata": {"name": _ACCOUNT}})
    _bind(server, "clusterrolebindings", {"kind": "ServiceAccount", "name": _ACCOUNT, "namespace": "default"})
    answer = server.request("POST", f"{accounts}/{_ACCOUNT}/token", {"spec": {"expirationSeconds": 7200}})
    assert answer.accepted, answer.message
    config = yaml.safe_load(kubeconfig.read_text())
    config["users"][0]["user"] = {"token": answer.body["status"]["token"]}
    path = folder / "operator.kubeconfig"
    path.write_text(json.dumps(config))
    return path


def measure(kubeconfig: Path, arguments: argparse.Namespace) -> Raw:
    """Measures calm and storm; returns the report."""
    server = Server(kubeconfig)
    _prepare(server, ["honest", *(f"tenant-{number}" for number in range(arguments.hostile))])
    world = World(kubeconfig, "honest")
    world.wait(lambda: world.get("serviceaccounts", "default"))
    jobs = HonestJobs(Tenant(kubeconfig, "honest"), world)
    Watch(kubeconfig, world.path("pods"), jobs).start()
    lease = {"leaseSeconds": 15, "renewSeconds": 10, "retrySeconds": 2, "enabled": True}
    with tempfile.TemporaryDirectory() as folder:
        account = _account(server, kubeconfig, Path(folder))
        operator = Operator(account, Path(folder), ("default",), leader_election=lease, watchNamespaces=[])
        operator.start()
        try:
            calm = jobs.run(arguments.honest * 2, arguments.calm_seconds, "calm")
            memory = [_memory(operator.pid)]
            victim = world.get(names.PLURAL, "calm-0")
            assert victim is not None
            storm = Storm(kubeconfig, operator, victim)
            storm.start(arguments.hostile)
            waited = jobs.run(arguments.honest, arguments.seconds / 2, "first")
            memory.append(_memory(operator.pid))
            waited += jobs.run(arguments.honest, arguments.seconds / 2, "second")
            memory.append(_memory(operator.pid))
            attacks = storm.stop()
            alive, leading = operator.is_running, operator.samples("finetune_operator_leader") == [1.0]
            ended = [line["message"] for line in operator.log_lines() if line["level"] == "critical"]
            time.sleep(5)
            jobs.check([f"{part}-{n}" for part in ("first", "second") for n in range(arguments.honest)])
        finally:
            operator.stop()
    return {
        "seconds": arguments.seconds, "hostile_tenants": arguments.hostile, "calm": _figures(calm),
        "storm": _figures(waited), "ratio_of_p99": round(max(waited) / max(calm), 2), "operator_alive": alive,
        "still_leader": leading, "critical": ended, "wrong_statuses": jobs.wrong, "memory_mib": memory,
        "attacks": attacks,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()[0]},
    }  # fmt: skip


def main() -> int:
    """Runs the benchmark. Returns 1 if the storm cost the honest jobs more than the aim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of the storm")
    parser.add_argument("--calm-seconds", type=float, default=60.0, help="duration without it, before")
    parser.add_argument("--honest", type=int, default=20, help="honest jobs in each half of the storm; twice in calm")
    parser.add_argument("--hostile", type=int, default=10, help="hostile tenants")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/storm.json", help="result file")
    arguments = parser.parse_args()
    cluster = localcluster.up(name=f"storm-{os.getpid()}", control_plane_only=True)
    try:
        cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(ROOT / "crds"))
        report = measure(Path(cluster.kubeconfig), arguments)
    finally:
        cluster.down()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    unharmed = report["operator_alive"] and report["still_leader"] and not report["critical"]
    flat = report["memory_mib"][2] <= report["memory_mib"][1] * _MOST_MEMORY_GROWTH
    right = not report["wrong_statuses"]
    return 0 if unharmed and flat and right and report["ratio_of_p99"] <= _AIM else 1


if __name__ == "__main__":
    sys.exit(main())
