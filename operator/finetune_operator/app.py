"""app: the operator's parts, wired, in the order in which they start. Called by __main__; knows no job.

Whatever ends, ends the process: a restart converges.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from pathlib import Path

import kopf
from aiohttp import web

from finetune_api import names
from finetune_operator import cluster as clusters
from finetune_operator import doors, http, job_metrics
from finetune_operator.cache import Cache
from finetune_operator.cluster import Cluster, Unavailable
from finetune_operator.leader import Leadership
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressDesk
from finetune_operator.queue import Queue
from finetune_operator.reconcile import Reconciler
from finetune_operator.recorder import Recorder
from finetune_operator.reports import Reports
from finetune_operator.settings import Identity, Settings
from finetune_operator.sweep import sweep, sweep_for_ever

log = logging.getLogger(__name__)

EXIT_SURPRISE = 1


class App:
    """One replica."""

    def __init__(self, settings: Settings, identity: Identity, cluster: Cluster, metrics: Metrics) -> None:
        self._settings = settings
        self._cluster = cluster
        self._metrics = metrics
        self._cache = Cache()
        self._queue = Queue(metrics.observe_wait)
        self._reports = Reports()
        self._leadership = Leadership(cluster, settings.leader_election, identity)
        self._reconciler = Reconciler(
            cluster, self._cache, self._queue, self._reports, settings, Recorder(cluster, identity.pod_name)
        )
        self._synced = False
        self._stop = asyncio.Event()
        self._surprise: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        job_metrics.register(metrics.registry, self._cache, self._reports, settings.metrics_retention_seconds)

    async def run(self, kubeconfig: Path | None) -> int:
        """Returns the exit code."""
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, self._stop.set)
        runners = await self._serve()
        try:
            if await self._lead():
                return await self._work(kubeconfig)
            return 0
        finally:
            await self._leadership.release()
            for runner in runners:
                await runner.cleanup()
            await self._cluster.close()

    async def _serve(self) -> list[web.AppRunner]:
        settings = self._settings
        desk = ProgressDesk(
            self._cluster,
            self._cache,
            self._queue,
            self._reports,
            self._leadership,
            settings.progress,
            self._metrics.count_post,
        )
        runners = (
            await http.serve(http.probes_app(self._missing), settings.probes_port, "probes"),
            await http.serve(
                http.metrics_app(self._metrics.registry, self._refresh_gauges), settings.metrics_port, "metrics"
            ),
            await http.serve(desk.app(), settings.progress.port, "progress"),
        )
        return [runner for runner in runners if runner]

    async def _lead(self) -> bool:
        """Whether the Lease was taken before somebody asked us to stop."""
        acquiring = asyncio.ensure_future(self._leadership.acquire())
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((acquiring, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not acquiring.done():
            acquiring.cancel()
            return False
        acquiring.result()
        return True

    async def _work(self, kubeconfig: Path | None) -> int:
        """Everything listed first, so that no decision is made on half of what is there; then the watches."""
        settings, namespaces = self._settings, self._settings.watch_namespaces
        await clusters.wait_until_answering(self._cluster, names.PLURAL, namespaces)
        await sweep(self._cluster, self._cache, self._queue, namespaces)
        self._metrics.swept.set_to_current_time()
        self._synced = True
        watches = kopf.operator(
            registry=doors.registry(self._cache, self._queue, self._die, kubeconfig),
            settings=doors.settings(),
            clusterwide=not namespaces,
            namespaces=namespaces,
        )
        parts = [
            asyncio.create_task(watches, name="watches"),
            asyncio.create_task(self._leadership.keep(), name="lease"),
            asyncio.create_task(
                sweep_for_ever(self._cluster, self._cache, self._queue, namespaces, settings.sweep_seconds),
                name="sweep",
            ),
            asyncio.create_task(self._metrics.watch_loop(), name="loop lag"),
            *(asyncio.create_task(self._worker(), name=f"worker {n}") for n in range(settings.limits.workers)),
        ]
        await asyncio.wait((*parts, self._surprise), return_when=asyncio.FIRST_COMPLETED)
        return await self._end(parts)

    async def _end(self, parts: list[asyncio.Task[None]]) -> int:
        """0 where kopf was told to stop by a signal; anything else that ended is a surprise."""
        ended = [part for part in parts if part.done()]
        code = 0
        for part in ended:
            error = None if part.cancelled() else part.exception()
            if error or part.get_name() != "watches":
                log.critical("%s ended: %r", part.get_name(), error, exc_info=error)
                code = EXIT_SURPRISE
        if self._surprise.done():
            log.critical("surprise at a door", exc_info=self._surprise.exception())
            code = EXIT_SURPRISE
        for part in parts:
            part.cancel()
        await asyncio.wait(parts, timeout=5)
        return code

    async def _worker(self) -> None:
        while True:
            key = await self._queue.take()
            started = time.monotonic()
            try:
                await self._reconciler.reconcile(key)
            except Unavailable as error:
                delay = self._queue.failed(key)
                log.warning("again in %.1f s: %s", delay, error, extra={"namespace": key[0], "job": key[1]})
                self._metrics.observe_turn("retried", time.monotonic() - started)
            else:
                self._queue.done(key)
                self._metrics.observe_turn("done", time.monotonic() - started)

    def _die(self, surprise: BaseException) -> None:
        if not self._surprise.done():
            self._surprise.set_exception(surprise)

    def _missing(self) -> str:
        if self._leadership.is_leader:
            return "" if self._synced else "the cache isn't filled yet"
        return "" if self._leadership.holder else "the lease hasn't been read yet"

    def _refresh_gauges(self) -> None:
        self._metrics.leader.set(float(self._leadership.is_leader))
        self._metrics.queue_depth.set(len(self._queue))
        for resource, size in self._cache.sizes().items():
            self._metrics.cached.labels(resource).set(size)


async def run(settings: Settings, identity: Identity, kubeconfig: Path | None) -> int:
    """One replica's life. Returns the exit code."""
    metrics = Metrics()
    limits = settings.limits
    cluster = await clusters.connect(limits.requests_per_second, limits.burst, metrics.count_request, kubeconfig)
    return await App(settings, identity, cluster, metrics).run(kubeconfig)
