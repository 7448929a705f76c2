"""What operator_latency makes of what it saw: jobs, figures, report. Pure; called by operator_latency alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Raw = dict[str, Any]
WARM_UP = "warm"
"""Jobs whose names begin so aren't measured."""
_WRITES = ("create", "update", "patch", "delete", "deletecollection")


@dataclass(frozen=True)
class Asked:
    """How many jobs of each kind, at how many a second, of how many pods."""

    jobs: int
    rate: float
    pods: int


@dataclass
class Side:
    """One way of making jobs, and what was seen of it."""

    name: str
    namespace: str
    pods: int  # of a job
    created: dict[str, float] = field(default_factory=dict)  # by job: when the POST was sent
    complete: dict[str, float] = field(default_factory=dict)  # by job: when the last pod was seen
    cpu: dict[str, float] = field(default_factory=dict)  # seconds, by process

    def latencies(self) -> list[float]:
        measured = [name for name in self.created if not name.startswith(WARM_UP)]
        return sorted(self.complete[name] - self.created[name] for name in measured)


def plain_job(name: str, pods: int) -> Raw:
    """What the operator would create, without an operator."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "i"}]}},
        },
    }


def writes(audit_log: Iterable[str], namespace: str) -> Counter[str]:
    """Requests that changed something in a namespace, by who sent them; warm-up included. `audit_log` is its lines."""
    found: Counter[str] = Counter()
    for line in audit_log:
        event = json.loads(line)
        if event["verb"] in _WRITES and event.get("objectRef", {}).get("namespace") == namespace:
            found[event.get("userAgent", "").split("/")[0]] += 1
    return found


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return values[min(len(values) - 1, int(share * len(values)))]


def job_ended(job: Raw) -> bool:
    return any(
        c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in job["status"].get("conditions", ())
    )


def finetunejob_ended(job: Raw) -> bool:
    return job.get("status", {}).get("phase") in ("Succeeded", "Failed")


def report_of(sides: Sequence[Side], audit_log: Sequence[str], asked: Asked, machine: Raw) -> Raw:
    """What is kept: figures, and what they were taken on."""
    rows = []
    for side in sides:
        values = side.latencies()
        sent = writes(audit_log, side.namespace)
        made = len(side.created)
        rows.append(
            {
                "side": side.name,
                "p50_seconds": round(percentile(values, 0.50), 4),
                "p99_seconds": round(percentile(values, 0.99), 4),
                "writes_per_job": round(sum(sent.values()) / made, 1),
                "writes_per_job_by": {who: round(count / made, 1) for who, count in sent.most_common()},
                "cpu_seconds_per_100_jobs": {
                    who: round(100 * spent / asked.jobs, 1) for who, spent in sorted(side.cpu.items()) if spent
                },
            }
        )
    plain, ours = rows
    aim = 1.5 * plain["p99_seconds"] + 0.2
    return {
        "benchmark": "operator_latency",
        "jobs": asked.jobs,
        "rate_per_second": asked.rate,
        "pods_per_job": asked.pods,
        "machine": machine,
        "rows": rows,
        "aim_p99_seconds": round(aim, 4),
        "within_aim": ours["p99_seconds"] <= aim,
    }


def show(report: Raw) -> None:
    print(
        f"{report['jobs']} jobs of {report['pods_per_job']} pods at {report['rate_per_second']:g}/s: create → all pods"
    )
    print(f"{'':20} {'p50 ms':>8} {'p99 ms':>8} {'writes/job':>11}  CPU s per 100 jobs")
    for row in report["rows"]:
        spent = ", ".join(f"{who} {seconds}" for who, seconds in row["cpu_seconds_per_100_jobs"].items())
        p50, p99 = 1000 * row["p50_seconds"], 1000 * row["p99_seconds"]
        print(f"{row['side']:20} {p50:8.0f} {p99:8.0f} {row['writes_per_job']:11.1f}  {spent}")
        print(f"{'':20} writes/job by {row['writes_per_job_by']}")
    verdict = "within" if report["within_aim"] else "BEYOND"
    print(f"{verdict} the aim: p99 at most 1.5 x the plain Job's + 200 ms = {1000 * report['aim_p99_seconds']:.0f} ms")
