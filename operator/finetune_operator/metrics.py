"""metrics: the operator's own series. Counted by cluster, queue and the workers; served by http.

The series of jobs are in job_metrics. Decides nothing.
"""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

_LAG_INTERVAL_SECONDS = 0.5
_WAIT_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)


class Metrics:
    """One registry; labels have few values."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._reconciles = Counter(
            "finetune_operator_reconcile", "Turns, by how they ended (done, retried).", ["result"],
            registry=self.registry,
        )  # fmt: skip
        self._duration = Histogram(
            "finetune_operator_reconcile_duration_seconds", "Time of a turn.", buckets=_WAIT_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self._wait = Histogram(
            "finetune_operator_queue_wait_seconds", "Time that a job waited for a worker.", buckets=_WAIT_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.queue_depth = Gauge(
            "finetune_operator_queue_depth", "Jobs that wait for a worker.", registry=self.registry
        )
        self._requests = Counter(
            "finetune_operator_api_requests", "Requests to the API server, watches aside.",
            ["verb", "resource", "code"], registry=self.registry,
        )  # fmt: skip
        self._posts = Counter(
            "finetune_operator_progress_posts", "Progress posts of trainer pods, by answer.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.leader = Gauge("finetune_operator_leader", "1 where this replica works.", registry=self.registry)
        self._lag = Gauge(
            "finetune_operator_event_loop_lag_seconds", "How late the event loop was at its last look.",
            registry=self.registry,
        )  # fmt: skip
        self.swept = Gauge(
            "finetune_operator_last_sweep_timestamp_seconds", "When everything was last listed.",
            registry=self.registry,
        )  # fmt: skip
        self.cached = Gauge(
            "finetune_operator_cache_objects", "Objects in the cache.", ["resource"], registry=self.registry
        )

    def count_request(self, verb: str, resource: str, code: str) -> None:
        self._requests.labels(verb, resource, code).inc()

    def count_post(self, code: int) -> None:
        self._posts.labels(str(code)).inc()

    def observe_wait(self, seconds: float) -> None:
        self._wait.observe(seconds)

    def observe_turn(self, result: str, seconds: float) -> None:
        self._reconciles.labels(result).inc()
        self._duration.observe(seconds)

    async def watch_loop(self) -> None:
        """For ever: how late is a timer?"""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_INTERVAL_SECONDS
            await asyncio.sleep(_LAG_INTERVAL_SECONDS)
            self._lag.set(max(0.0, loop.time() - due))
