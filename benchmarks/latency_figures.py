"""Computes the figures and the report of operator_latency from its observations. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Raw = dict[str, Any]
WARM_UP = "warm"
"""Jobs whose names begin with this prefix aren't measured."""
API_SERVER = "kube-apiserver"
_WRITES = ("create", "update", "patch", "delete", "deletecollection")


@dataclass(frozen=True)
class Load:
    """The number of jobs of each kind, jobs created per second (0: at once), and pods per job."""

    jobs: int
    rate: float
    pods: int


@dataclass
class Side:
    """One kind of job, and what was observed of its jobs."""

    name: str
    namespace: str
    pods: int  # per job
    created: dict[str, float] = field(default_factory=dict)  # by job: when the POST was sent
    complete: dict[str, float] = field(default_factory=dict)  # by job: when the watch reported its last pod
    cpu: dict[str, float] = field(default_factory=dict)  # seconds, by process

    def latencies(self) -> list[float]:
        """Returns the seconds from creation to the last pod of each measured job, sorted."""
        measured = [name for name in self.created if not name.startswith(WARM_UP)]
        return sorted(self.complete[name] - self.created[name] for name in measured)

    def seconds(self) -> float:
        """Returns the seconds from the first creation to the last pod of all measured jobs."""
        measured = [name for name in self.created if not name.startswith(WARM_UP)]
        return max(self.complete[name] for name in measured) - min(self.created[name] for name in measured)


def plain_job(name: str, pods: int) -> Raw:
    """Returns a Job like the one that the operator would create."""
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
    """Counts the write requests in a namespace by user agent, including those of the warm-up.

    `audit_log` are the lines of the audit log.
    """
    counts: Counter[str] = Counter()
    for line in audit_log:
        event = json.loads(line)
        if event["verb"] in _WRITES and event.get("objectRef", {}).get("namespace") == namespace:
            counts[event.get("userAgent", "").split("/")[0]] += 1
    return counts


def writes_by_object(audit_log: Iterable[str], namespace: str) -> Counter[str]:
    """Counts the write requests in a namespace by verb, resource and user agent."""
    counts: Counter[str] = Counter()
    for line in audit_log:
        event = json.loads(line)
        target = event.get("objectRef", {})
        if event["verb"] in _WRITES and target.get("namespace") == namespace:
            resource = "/".join(filter(None, (target["resource"], target.get("subresource"))))
            counts[f"{event['verb']} {resource} by {event.get('userAgent', '').split('/')[0]}"] += 1
    return counts


def percentile(values: list[float], share: float) -> float:
    """Returns a percentile of sorted values by the nearest rank; `share` is from 0 to 1."""
    return values[min(len(values) - 1, int(share * len(values)))]


def job_ended(job: Raw) -> bool:
    """Whether a Job completed or failed."""
    return any(
        c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in job["status"].get("conditions", ())
    )


def finetunejob_ended(job: Raw) -> bool:
    """Whether a FineTuneJob succeeded or failed."""
    return job.get("status", {}).get("phase") in ("Succeeded", "Failed")


def report_of(sides: Sequence[Side], audit_log: Sequence[str], load: Load, machine: Raw) -> Raw:
    """Returns the result file's document: the figures and the machine that they are from."""
    rows = []
    for side in sides:
        values = side.latencies()
        sent = writes(audit_log, side.namespace)
        job_count = len(side.created)
        rows.append(
            {
                "side": side.name,
                "p50_seconds": round(percentile(values, 0.50), 4),
                "p99_seconds": round(percentile(values, 0.99), 4),
                "writes_per_job": round(sum(sent.values()) / job_count, 1),
                "writes_per_job_by": {agent: round(count / job_count, 1) for agent, count in sent.most_common()},
                "writes_per_job_of": {
                    write: round(count / job_count, 2)
                    for write, count in writes_by_object(audit_log, side.namespace).most_common()
                },
                "jobs_per_second": round(load.jobs / side.seconds(), 1),
                "api_server_cpu_seconds_per_job": round(side.cpu.get(API_SERVER, 0.0) / load.jobs, 4),
                "cpu_seconds_per_100_jobs": {
                    process: round(100 * spent / load.jobs, 1) for process, spent in sorted(side.cpu.items()) if spent
                },
            }
        )
    aims = _aims(*rows, at_once=not load.rate)
    return {
        "benchmark": "operator_latency",
        "jobs": load.jobs,
        "rate_per_second": load.rate,
        "pods_per_job": load.pods,
        "machine": machine,
        "rows": rows,
        "aims": aims,
        "within_aim": all(aim["is_met"] for aim in aims),
    }


def _aims(plain: Raw, ours: Raw, *, at_once: bool) -> list[Raw]:
    """Returns the aims, what was measured, and whether each is met."""
    if at_once:
        share = ours["jobs_per_second"] / plain["jobs_per_second"]
        return [_aim("jobs per second, relative to the plain Job's", share, at_least=0.5)]
    ratio = ours["api_server_cpu_seconds_per_job"] / max(plain["api_server_cpu_seconds_per_job"], 1e-9)
    return [
        _aim("p99 seconds from creation to all pods", ours["p99_seconds"], at_most=1.0),
        _aim("API server's CPU time per job, relative to the plain Job's", ratio, at_most=2.0),
    ]


def _aim(figure: str, value: float, at_least: float = 0.0, at_most: float = float("inf")) -> Raw:
    limit = {"at_least": at_least} if at_least else {"at_most": at_most}
    return {"figure": figure, "value": round(value, 3), **limit, "is_met": at_least <= value <= at_most}


def show(report: Raw) -> None:
    """Prints the report as a table."""
    rate = report["rate_per_second"]
    offered = f"at {rate:g}/s" if rate else "at once"
    print(f"{report['jobs']} jobs of {report['pods_per_job']} pods {offered}, from creation to all pods")
    print(f"{'':20} {'p50 ms':>8} {'p99 ms':>8} {'writes/job':>11}  CPU s per 100 jobs")
    for row in report["rows"]:
        spent = ", ".join(f"{process} {seconds}" for process, seconds in row["cpu_seconds_per_100_jobs"].items())
        p50, p99 = 1000 * row["p50_seconds"], 1000 * row["p99_seconds"]
        print(f"{row['side']:20} {p50:8.0f} {p99:8.0f} {row['writes_per_job']:11.1f}  {spent}")
        cpu = row["api_server_cpu_seconds_per_job"]
        print(f"{'':20} API server: {cpu:.3f} s of CPU per job; pods of {row['jobs_per_second']:.1f} jobs per second")
        print(f"{'':20} writes/job by {row['writes_per_job_by']}")
    for aim in report["aims"]:
        limit = f"at least {aim['at_least']:g}" if "at_least" in aim else f"at most {aim['at_most']:g}"
        print(f"{'met' if aim['is_met'] else 'MISSED'}: {aim['figure']}: {aim['value']:g}; the aim is {limit}")
