"""Wires the operator's parts together and runs them.

If any part ends, the process ends, and Kubernetes restarts it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import time
from datetime import timedelta
from pathlib import Path

import kopf
from aiohttp import web

from finetune_api import names
from finetune_operator.controller import watches
from finetune_operator.controller.event_recorder import EventRecorder
from finetune_operator.controller.reconcile import Reconciler
from finetune_operator.controller.resync import first_resync, resync_periodically
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.workqueue import BrokenInvariant, WorkQueue
from finetune_operator.kube.client import KubeClient, Unavailable, connect, wait_until_available
from finetune_operator.kube.leader_election import Leadership
from finetune_operator.servers import job_metrics, probes
from finetune_operator.servers.connections import Limits, serve
from finetune_operator.servers.metrics import Metrics
from finetune_operator.servers.progress_server import ProgressServer
from finetune_operator.servers.tls import Certificate, Lease
from finetune_operator.settings import Identity, Settings

log = logging.getLogger(__name__)

EXIT_UNEXPECTED = 1

_PROBES = Limits(connections=64, per_address=32)
_METRICS = Limits(connections=64, per_address=16)


class App:
    """Runs one replica of the operator."""

    def __init__(self, settings: Settings, identity: Identity, client: KubeClient, metrics: Metrics) -> None:
        self._settings = settings
        self._client = client
        self._metrics = metrics
        self._state = ControllerState(WorkQueue(metrics.observe_wait), clock=client.clock)
        self._leadership = Leadership(client, settings.leader_election, identity)
        self._reconciler = Reconciler(client, self._state, settings, EventRecorder(client, identity.pod_name))
        self._synced = False
        self._stop = asyncio.Event()
        self._watch_error: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        job_metrics.register(
            metrics.registry, self._state.cache, self._state.progress, settings.metrics_retention_seconds
        )

    async def run(self, kubeconfig: Path | None) -> int:
        """Runs until it is asked to stop or a part ends. Returns the exit code."""
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
            await self._client.close()

    async def _serve(self) -> list[web.AppRunner]:
        """Starts the HTTP servers that aren't turned off. Returns their runners."""
        settings = self._settings
        progress_server = ProgressServer(
            self._client, self._state, self._leadership, settings.progress, self._metrics.count_post
        )
        runners = (
            await serve(probes.probes_app(self._not_ready_reason), settings.probes_port, "probes", _PROBES),
            await serve(
                probes.metrics_app(self._metrics.registry, self._refresh_gauges),
                settings.metrics_port,
                "metrics",
                _METRICS,
            ),
            await serve(progress_server.app(), settings.progress.port, "progress", Limits(), self._context()),
        )
        return [runner for runner in runners if runner]

    def _context(self) -> ssl.SSLContext | None:
        """Returns the TLS context of the progress server; None without TLS."""
        progress = self._settings.progress
        if not progress.certificate or not progress.port:
            return None
        lease = Lease(progress.recognized_name, timedelta(seconds=progress.certificate_seconds))
        return Certificate(Path(progress.certificate), lease).context()

    async def _lead(self) -> bool:
        """Waits for the Lease. Returns whether it was acquired before a signal to stop."""
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
        """Lists all objects before the first decision, then runs watches and workers."""
        settings, namespaces, state = self._settings, self._settings.watch_namespaces, self._state
        await wait_until_available(self._client, names.PLURAL, namespaces)
        set_resync_time = self._metrics.last_resync.set_to_current_time
        await first_resync(self._client, state, namespaces, set_resync_time)
        self._synced = True
        operator = kopf.operator(
            registry=watches.registry(state.cache, state.queue, self._abort, kubeconfig),
            settings=watches.kopf_settings(),
            clusterwide=not namespaces,
            namespaces=namespaces,
        )
        parts = [
            asyncio.create_task(operator, name="watches"),
            asyncio.create_task(self._leadership.renew(), name="lease"),
            asyncio.create_task(
                resync_periodically(self._client, state, namespaces, set_resync_time, settings.sweep_seconds),
                name="resync",
            ),
            asyncio.create_task(self._metrics.measure_loop_lag(), name="loop lag"),
            *(asyncio.create_task(self._worker(), name=f"worker {n}") for n in range(settings.limits.workers)),
        ]
        await asyncio.wait((*parts, self._watch_error), return_when=asyncio.FIRST_COMPLETED)
        return await self._end(parts)

    async def _end(self, parts: list[asyncio.Task[None]]) -> int:
        """Cancels all parts and returns the exit code.

        That is 0 if kopf has stopped because of a signal; any other end is unexpected.
        """
        ended = [part for part in parts if part.done()]
        code = 0
        for part in ended:
            error = None if part.cancelled() else part.exception()
            if error or part.get_name() != "watches":
                log.critical("%s ended unexpectedly: %r", part.get_name(), error, exc_info=error)
                code = EXIT_UNEXPECTED
        if self._watch_error.done():
            log.critical("unexpected error in a watch", exc_info=self._watch_error.exception())
            code = EXIT_UNEXPECTED
        for part in parts:
            part.cancel()
        await asyncio.wait(parts, timeout=5)
        return code

    async def _worker(self) -> None:
        """Reconciles one queued job after another, forever."""
        while True:
            key = await self._state.queue.take()
            started_at = time.monotonic()
            try:
                await self._reconciler.reconcile(key)
            except Unavailable as error:
                delay = self._state.queue.failed(key)
                log.warning(
                    "reconcile failed, retrying in %.1f s: %s", delay, error, extra={"namespace": key[0], "job": key[1]}
                )
                self._metrics.observe_reconcile("retried", time.monotonic() - started_at)
            except BrokenInvariant:
                raise
            except Exception as error:  # whatever one job contains, the others are served
                delay = self._state.queue.failed(key)
                log.exception(
                    "reconcile failed unexpectedly, retrying in %.1f s", delay,
                    extra={"namespace": key[0], "job": key[1]},
                )  # fmt: skip
                self._metrics.observe_reconcile("failed", time.monotonic() - started_at)
                await self._reconciler.report_error(key, error, delay)
            else:
                self._state.queue.done(key)
                self._metrics.observe_reconcile("done", time.monotonic() - started_at)

    def _abort(self, error: BaseException) -> None:
        """Ends the process because of an unexpected error in a watch."""
        if not self._watch_error.done():
            self._watch_error.set_exception(error)

    def _not_ready_reason(self) -> str:
        """Returns why this replica isn't ready; empty if it is."""
        if self._leadership.is_leader:
            return "" if self._synced else "the cache hasn't been filled yet"
        return "" if self._leadership.holder else "the lease hasn't been read yet"

    def _refresh_gauges(self) -> None:
        """Updates the metrics whose values are read at each scrape."""
        self._metrics.leader.set(float(self._leadership.is_leader))
        self._metrics.queue_depth.set(len(self._state.queue))
        for resource, size in self._state.cache.sizes().items():
            self._metrics.cached.labels(resource).set(size)


async def run(settings: Settings, identity: Identity, kubeconfig: Path | None) -> int:
    """Runs one replica and returns its exit code."""
    metrics = Metrics()
    limits = settings.limits
    client = await connect(limits.requests_per_second, limits.burst, metrics.count_request, kubeconfig)
    return await App(settings, identity, client, metrics).run(kubeconfig)
