"""Measures what hostile tenants cost the jobs of others.

    python benchmarks/storm.py [--seconds 600] [--honest 20] [--hostile 10]

The benchmark starts its own control plane (real etcd, API server and Job controller; no nodes) and
runs the unmodified operator with a Lease. It creates honest jobs twice, evenly over the time: in
calm, and beside tenants who flood it with jobs, tokens, connections, scrapes, and forged Jobs and
pods. It compares the times until the pods exist, and writes benchmarks/results/storm.json.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import platform
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "hack"), str(ROOT / "tests"), str(ROOT / "operator")]

import localcluster  # noqa: E402
from api.support.api_server import Server  # noqa: E402
from finetune_api import names  # noqa: E402
from k8s_operator.support.kubelet_stand_in import World, job_body  # noqa: E402
from k8s_operator.support.operator_process import Operator  # noqa: E402

Raw = dict[str, Any]
_CALM_PHASES = {"Pending", "Starting"}  # without nodes, no honest job gets further
_AIM = 2.0  # how much longer the slowest honest jobs may wait in the storm


class Storm:
    """The hostile tenants. Each has a namespace, one kind of attack, and full rights in there."""

    def __init__(self, kubeconfig: Path, operator: Operator, victim: Raw) -> None:
        self._kubeconfig = kubeconfig
        self._operator = operator
        self._victim = victim["metadata"]
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.done: Counter[str] = Counter()
        self.attacks: tuple[Callable[[World, int], None], ...] = (
            self.jobs, self.strange_specs, self.invented_tokens, self.unsigned_tokens, self.half_open_connections,
            self.scrapes, self.forged_jobs, self.forged_pods, self.bad_bodies, self.suspensions,
        )  # fmt: skip

    def start(self, tenants: list[World]) -> None:
        """Starts one thread per tenant."""
        for number, tenant in enumerate(tenants):
            attack = self.attacks[number % len(self.attacks)]
            thread = threading.Thread(target=self._repeat, args=(attack, tenant), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Ends all attacks."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30)

    def _repeat(self, attack: Callable[[World, int], None], tenant: World) -> None:
        number = 0
        while not self._stop.is_set():
            with contextlib.suppress(OSError, AssertionError):
                attack(tenant, number)
            number += 1
            self.done[attack.__name__] += 1

    def jobs(self, tenant: World, number: int) -> None:
        """Creates jobs, and deletes each after a hundred others."""
        tenant.request("POST", tenant.path(names.PLURAL), job_body(f"flood-{number}"))
        tenant.delete(names.PLURAL, f"flood-{number - 100}")

    def strange_specs(self, tenant: World, number: int) -> None:
        """Creates jobs whose texts are long or have characters that some parsers refuse."""
        data = {"uri": f"s3://data/train-😀{'x' * (number % 900)}.jsonl"}
        tenant.request("POST", tenant.path(names.PLURAL), job_body(f"strange-{number % 50}", dataset=data))
        tenant.delete(names.PLURAL, f"strange-{(number + 25) % 50}")

    def suspensions(self, tenant: World, number: int) -> None:
        """Suspends and resumes one job as fast as possible."""
        tenant.request("POST", tenant.path(names.PLURAL), job_body("swing"))
        tenant.patch(names.PLURAL, "swing", {"spec": {"runPolicy": {"suspend": number % 2 == 0}}})

    def forged_jobs(self, tenant: World, number: int) -> None:
        """Creates Jobs that claim to be attempts of an honest job."""
        labels = {"app.kubernetes.io/managed-by": "finetune-operator", names.LABEL_JOB_UID: self._victim["uid"],
                  names.LABEL_ROLE: "trainer", names.LABEL_ATTEMPT: ("5000", "boom")[number % 2]}  # fmt: skip
        spec = {"suspend": True, "completions": 2**31 - 1, "parallelism": 1, "template": {"spec": _pod_spec()}}
        name = f"forged-{number % 30}"
        meta = {"name": name, "labels": labels, "ownerReferences": [self._owner()]}
        tenant.request("POST", tenant.path("jobs"), {"metadata": meta, "spec": spec})
        tenant.delete("jobs", f"forged-{(number + 15) % 30}", propagationPolicy="Background")

    def forged_pods(self, tenant: World, number: int) -> None:
        """Creates pods with the labels of an honest job's pods."""
        labels = {"app.kubernetes.io/managed-by": "finetune-operator", names.LABEL_JOB_UID: self._victim["uid"],
                  names.LABEL_ROLE: "trainer", "batch.kubernetes.io/job-completion-index": "boom"}  # fmt: skip
        name = f"forged-{number % 30}"
        meta = {"name": name, "labels": labels, "ownerReferences": [self._owner()]}
        tenant.request("POST", tenant.path("pods"), {"metadata": meta, "spec": _pod_spec()})
        tenant.delete("pods", f"forged-{(number + 15) % 30}", gracePeriodSeconds=0)

    def invented_tokens(self, _tenant: World, number: int) -> None:
        """Posts with tokens that are none."""
        self._post(f"garbage-{number}", b"{}")

    def unsigned_tokens(self, _tenant: World, number: int) -> None:
        """Posts with tokens that claim to be of a pod."""
        claims = {"aud": [names.PROGRESS_AUDIENCE], "exp": time.time() + 600,
                  "kubernetes.io": {"namespace": "honest", "pod": {"name": "x", "uid": str(number)}}}  # fmt: skip
        part = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
        self._post(f"e30.{part}.c2ln", b"{}")

    def bad_bodies(self, _tenant: World, number: int) -> None:
        """Posts long, nested and compressed bodies."""
        self._post("x", (b"[" * 15000, b"\x1f\x8b" * 8000, b"x" * 200000)[number % 3])

    def half_open_connections(self, _tenant: World, _number: int) -> None:
        """Opens connections and says nothing."""
        ports = (self._operator.progress_port, self._operator.metrics_port)
        with contextlib.ExitStack() as stack:
            for port in ports * 30:
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=2))
            time.sleep(0.5)

    def scrapes(self, _tenant: World, _number: int) -> None:
        """Reads the metrics."""
        self._operator.get(self._operator.metrics_port, "/metrics")

    def _post(self, token: str, body: bytes) -> None:
        head = (f"POST {names.PROGRESS_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")  # fmt: skip
        with socket.create_connection(("127.0.0.1", self._operator.progress_port), timeout=5) as connection:
            connection.sendall(head.encode() + body)
            connection.recv(4096)

    def _owner(self) -> Raw:
        return {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": self._victim["name"],
                "uid": self._victim["uid"], "controller": True}  # fmt: skip


def _pod_spec() -> Raw:
    return {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "i"}]}


def honest_jobs(world: World, count: int, seconds: float, prefix: str) -> list[float]:
    """Creates jobs evenly over the time. Returns the seconds until the pod of each existed."""
    begin, waited = time.monotonic(), []
    for number in range(count):
        time.sleep(max(0.0, begin + number * seconds / count - time.monotonic()))
        name, started = f"{prefix}-{number}", time.monotonic()
        world.submit(name)
        world.wait(lambda name=name: world.all("pods", **{"batch.kubernetes.io/job-name": f"{name}-1"}), 60)
        waited.append(time.monotonic() - started)
    time.sleep(max(0.0, begin + seconds - time.monotonic()))
    return waited


def _memory(pid: int) -> float:
    """Returns the resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024, 1)


def _figures(waited: list[float]) -> Raw:
    ordered = sorted(waited)
    return {"jobs": len(ordered), "p50": round(ordered[len(ordered) // 2], 3), "p99": round(ordered[-1], 3)}


def measure(kubeconfig: Path, arguments: argparse.Namespace) -> Raw:
    """Measures calm and storm; returns the report."""
    server = Server(kubeconfig)
    for name in ("honest", *(f"tenant-{number}" for number in range(arguments.hostile))):
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        server.request("POST", "/api/v1/namespaces", body)
    honest = World(kubeconfig, "honest")
    honest.wait(lambda: honest.get("serviceaccounts", "default"))
    tenants = [World(kubeconfig, f"tenant-{number}") for number in range(arguments.hostile)]
    lease = {"enabled": True, "leaseSeconds": 15, "renewSeconds": 10, "retrySeconds": 2}
    with tempfile.TemporaryDirectory() as folder:
        operator = Operator(kubeconfig, Path(folder), ("default",), leader_election=lease, watchNamespaces=[])
        operator.start()
        try:
            calm = honest_jobs(honest, arguments.honest, arguments.calm_seconds, "calm")
            memory = [_memory(operator.pid)]
            victim = honest.get(names.PLURAL, "calm-0")
            assert victim is not None
            storm = Storm(kubeconfig, operator, victim)
            storm.start(tenants)
            waited = honest_jobs(honest, arguments.honest, arguments.seconds / 2, "first")
            memory.append(_memory(operator.pid))
            waited += honest_jobs(honest, arguments.honest, arguments.seconds / 2, "second")
            memory.append(_memory(operator.pid))
            storm.stop()
            alive, leading = operator.is_running, operator.samples("finetune_operator_leader") == [1.0]
            ended = [line["message"] for line in operator.log_lines() if line["level"] == "critical"]
        finally:
            operator.stop()
    statuses = Counter(job.get("status", {}).get("phase", "none") for job in honest.all(names.PLURAL))
    return {
        "seconds": arguments.seconds, "hostile_tenants": arguments.hostile, "calm": _figures(calm),
        "storm": _figures(waited), "ratio_of_p99": round(max(waited) / max(calm), 2), "operator_alive": alive,
        "still_leader": leading, "critical": ended, "phases_of_honest_jobs": dict(statuses),
        "memory_mib": memory, "attacks": dict(storm.done),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()[0]},
    }  # fmt: skip


def main() -> int:
    """Runs the benchmark. Returns 1 if the storm cost the honest jobs more than the aim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of the storm")
    parser.add_argument("--calm-seconds", type=float, default=30.0, help="duration without it, before")
    parser.add_argument("--honest", type=int, default=20, help="honest jobs in calm, and in each half of the storm")
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
    calm = set(report["phases_of_honest_jobs"]) <= _CALM_PHASES
    unharmed = report["operator_alive"] and report["still_leader"] and not report["critical"] and calm
    return 0 if unharmed and report["ratio_of_p99"] <= _AIM else 1


if __name__ == "__main__":
    sys.exit(main())
