"""Measures the time from creating a FineTuneJob until all its pods exist.

    python benchmarks/operator_latency.py [--jobs 200] [--rate 10] [--nodes 2]
    python benchmarks/operator_latency.py --jobs 1000 --rate 0

Plain Indexed Jobs in the same run are the comparison. The benchmark starts its own control plane
(real etcd, API server, Job controller and scheduler; kwok simulates nodes and pods), runs the
unmodified operator, and prints p50 and p99 with each job's API writes and CPU time, that of the
API server apart. One clock measures from before the POST until a watch reports the last pod, and
nothing is polled. The results are written to benchmarks/results/operator_latency.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "hack"), str(ROOT / "tests"), str(ROOT / "operator")]

from latency_figures import WARM_UP, Load, Raw, Side, finetunejob_ended, job_ended, plain_job, report_of, show  # noqa: E402

import localcluster  # noqa: E402
from api.support.api_server import Server  # noqa: E402
from finetune_api import names  # noqa: E402
from k8s_operator.support.kubelet_stand_in import job_body  # noqa: E402
from k8s_operator.support.operator_process import Operator  # noqa: E402

_WARM_UP = 3


class Watch(threading.Thread):
    """Passes each event of a resource on to `record`. A watch costs the API server no lists, which
    would otherwise be a part of the CPU time that is measured."""

    def __init__(self, kubeconfig: Path, path: str, record: Callable[[Raw, float], None]) -> None:
        super().__init__(daemon=True)
        self._server = Server(kubeconfig)
        self._path = path
        self._record = record

    def run(self) -> None:
        """Watches until the server ends the watch."""
        connection = self._server._connection
        connection.timeout = None  # nothing may happen for a while
        connection.request("GET", f"{self._path}?watch=1&timeoutSeconds=3600")
        for line in connection.getresponse():
            event = json.loads(line)
            self._record(event, time.monotonic())


class PodRecord:
    """Records when the last pod of each job appears."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._pods_by_job: dict[str, set[str]] = defaultdict(set)

    def __call__(self, event: Raw, now: float) -> None:
        if event["type"] != "ADDED":
            return
        labels = event["object"]["metadata"]["labels"]
        job = labels.get(names.LABEL_JOB_NAME) or labels["batch.kubernetes.io/job-name"]
        self._pods_by_job[job].add(event["object"]["metadata"]["uid"])
        if len(self._pods_by_job[job]) == self._side.pods:
            self._side.complete.setdefault(job, now)


class EndRecord:
    """Records which jobs have ended, and lets others wait for them."""

    def __init__(self, has_ended: Callable[[Raw], bool]) -> None:
        self._has_ended = has_ended
        self._ended: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self, event: Raw, now: float) -> None:
        if event["type"] not in ("ADDED", "MODIFIED") or not self._has_ended(event["object"]):
            return
        with self._changed:
            self._ended.add(event["object"]["metadata"]["name"])
            self._changed.notify_all()

    def wait(self, jobs: Collection[str], seconds: float = 330) -> None:
        """Waits until all of these jobs have ended. Raises SystemExit after `seconds`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended.issuperset(jobs), seconds):
                raise SystemExit(f"{len(set(jobs) - self._ended)} jobs haven't ended within {seconds:g} s")


def offer(server: Server, side: Side, path: str, make: Any, count: int, rate: float, prefix: str) -> None:
    """Creates `count` jobs at `rate` per second, or one after the other if it is 0, without waiting
    for them.

    Raises SystemExit if the API server refuses one.
    """
    begin = time.monotonic()
    for number in range(count):
        if rate:
            time.sleep(max(0.0, begin + number / rate - time.monotonic()))
        name = f"{prefix}-{number}"
        side.created[name] = time.monotonic()
        answer = server.request("POST", path, make(name, side.pods))
        if not answer.accepted:
            raise SystemExit(f"{name}: {answer.message}")


def cpu_seconds(mark: str) -> dict[str, float]:
    """Returns the CPU seconds of processes whose command line contains `mark`, by program."""
    seconds: Counter[str] = Counter()
    ticks = os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if any(mark in word for word in arguments):
            seconds[_program(arguments)] += (int(stat[11]) + int(stat[12])) / ticks
    return dict(seconds)


def raise_priority(marks: tuple[str, ...]) -> None:
    """Raises the priority of this process and of those whose command line contains one of `marks`.

    It is for a machine on which other programs run.
    """
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            if entry.name == str(os.getpid()) or any(mark in command for mark in marks):
                os.setpriority(os.PRIO_PROCESS, int(entry.name), -20)
                (entry / "autogroup").write_text("-20")
        except OSError as error:
            print(f"the priority of process {entry.name} can't be raised: {error}", file=sys.stderr)


def _program(arguments: list[str]) -> str:
    if "finetune_operator" in arguments:
        return "finetune_operator"
    return Path(arguments[0]).name


def measure(server: Server, kubeconfig: Path, side: Side, path: str, make: Any, ended: Any, arguments: Any) -> None:
    """Measures one side, from its first job to the end of its last."""
    record = EndRecord(ended)
    Watch(kubeconfig, f"/api/v1/namespaces/{side.namespace}/pods", PodRecord(side)).start()
    Watch(kubeconfig, path, record).start()
    offer(server, side, path, make, _WARM_UP, arguments.rate, WARM_UP)
    record.wait(side.created)
    before = cpu_seconds(arguments.mark) | cpu_seconds(arguments.operator_mark)
    offer(server, side, path, make, arguments.jobs, arguments.rate, "job")
    record.wait(side.created)
    after = cpu_seconds(arguments.mark) | cpu_seconds(arguments.operator_mark)
    side.cpu = {name: round(after[name] - before.get(name, 0.0), 2) for name in after}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200, help="jobs of each kind")
    parser.add_argument("--rate", type=float, default=10.0, help="jobs created per second; 0 means at once")
    parser.add_argument("--nodes", type=int, default=2, help="pods per job")
    parser.add_argument("--prefer", action="store_true", help="raise the priority over other processes")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks/results/operator_latency.json",
        help="result file (default: benchmarks/results/operator_latency.json)",
    )
    arguments = parser.parse_args()
    name = f"latency-{os.getpid()}"
    arguments.mark = f"clusters/{name}/"
    cluster = localcluster.up(name=name, control_plane_only=True, audit=True, kwok=True, kwok_nodes=4)
    try:
        report = run(cluster, arguments)
    finally:
        cluster.down()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    return 0 if report["within_aim"] else 1


def run(cluster: Any, arguments: Any) -> Raw:
    """Measures both sides on a running cluster; returns the report."""
    kubeconfig = Path(cluster.kubeconfig)
    cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    server = Server(kubeconfig)
    while not _is_established(server):
        time.sleep(0.2)
    sides = [Side("plain Indexed Job", "plain", arguments.nodes), Side("FineTuneJob", "finetune", arguments.nodes)]
    for side in sides:
        cluster.kubectl("create", "namespace", side.namespace)
    time.sleep(2)  # until service accounts exist
    with tempfile.TemporaryDirectory() as folder:
        arguments.operator_mark = folder
        operator = Operator(kubeconfig, Path(folder), ("finetune",))
        operator.start()
        if arguments.prefer:
            raise_priority((arguments.mark, folder))
        try:
            jobs = "/apis/batch/v1/namespaces/plain/jobs"
            measure(server, kubeconfig, sides[0], jobs, plain_job, job_ended, arguments)
            path = f"/apis/{names.API_VERSION}/namespaces/finetune/{names.PLURAL}"
            measure(server, kubeconfig, sides[1], path, _finetunejob, finetunejob_ended, arguments)
        finally:
            operator.stop()
    load = Load(arguments.jobs, arguments.rate, arguments.nodes)
    machine = {
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "preferred": arguments.prefer,
    }
    return report_of(sides, Path(cluster.audit_log).read_text().splitlines(), load, machine)


def _is_established(server: Server) -> bool:
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{names.PLURAL}.{names.GROUP}"
    conditions = server.request("GET", path).body.get("status", {}).get("conditions") or ()
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def _finetunejob(name: str, nodes: int) -> Raw:
    resources = {"cpu": "1", "memory": "2Gi"}
    return job_body(name, distribution={"nodes": nodes}, resources=resources)


if __name__ == "__main__":
    sys.exit(main())
