"""Defines the operator's own metrics; those of the jobs are in `job_metrics`."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

_LAG_INTERVAL_SECONDS = 0.5
_WAIT_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)


class Metrics:
    """Holds the registry and the operator's metrics; every label has few values."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._reconciles = Counter(
            "finetune_operator_reconcile", "Reconciles, by result (done, retried, failed).", ["result"],
            registry=self.registry,
        )  # fmt: skip
        self._duration = Histogram(
            "finetune_operator_reconcile_duration_seconds", "Duration of a reconcile.", buckets=_WAIT_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self._wait = Histogram(
            "finetune_operator_queue_wait_seconds", "How long a job waited for a worker.", buckets=_WAIT_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.queue_depth = Gauge("finetune_operator_queue_depth", "Jobs waiting for a worker.", registry=self.registry)
        self._requests = Counter(
            "finetune_operator_api_requests", "Requests to the API server, except watches.",
            ["verb", "resource", "code"], registry=self.registry,
        )  # fmt: skip
        self._posts = Counter(
            "finetune_operator_progress_posts", "Progress posts of trainer pods, by response code.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.leader = Gauge("finetune_operator_leader", "1 if this replica is the leader.", registry=self.registry)
        self._lag = Gauge(
            "finetune_operator_event_loop_lag_seconds", "How late the last timer of the event loop was.",
            registry=self.registry,
        )  # fmt: skip
        self.last_resync = Gauge(
            "finetune_operator_last_sweep_timestamp_seconds", "When the last resync was completed.",
            registry=self.registry,
        )  # fmt: skip
        self.cached = Gauge(
            "finetune_operator_cache_objects", "Objects in the cache.", ["resource"], registry=self.registry
        )

    def count_request(self, verb: str, resource: str, code: str) -> None:
        """Counts a request to the API server."""
        self._requests.labels(verb, resource, code).inc()

    def count_post(self, code: int) -> None:
        """Counts a progress post by its response code."""
        self._posts.labels(str(code)).inc()

    def observe_wait(self, seconds: float) -> None:
        """Records how long a job waited in the queue."""
        self._wait.observe(seconds)

    def observe_reconcile(self, result: str, seconds: float) -> None:
        """Records the result (done, retried, failed) and the duration of a reconcile."""
        self._reconciles.labels(result).inc()
        self._duration.observe(seconds)

    async def measure_loop_lag(self) -> None:
        """Measures forever how late the event loop's timers are."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_INTERVAL_SECONDS
            await asyncio.sleep(_LAG_INTERVAL_SECONDS)
            self._lag.set(max(0.0, loop.time() - due))
