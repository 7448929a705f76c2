"""The operator reckons with the API server's time, whatever its own clock says."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from finetune_operator.controller.reconcile import Reconciler
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.workqueue import WorkQueue
from finetune_operator.core.objects import seconds_between
from finetune_operator.core.status import timestamp
from finetune_operator.kube.client import KubeClient, NotFound
from finetune_operator.kube.rate_limiter import RateLimiter
from finetune_operator.kube.server_clock import ServerClock
from finetune_operator.settings import Settings
from k8s_operator.support.kubelet_stand_in import job_body
from k8s_operator.support.raw_objects import Raw, job, pod, terminated


def _offset(clock: ServerClock) -> float:
    return (clock.now() - datetime.now(UTC)).total_seconds()


def _date(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(int(seconds), UTC), usegmt=True)


@pytest.mark.parametrize("ahead", [-7200.0, -90.0, -0.4, 0.0, 0.9, 90.0, 7200.0])
@pytest.mark.parametrize("took", [0.0, 0.3, 20.0])
def test_the_difference_is_bounded_by_the_answers(ahead: float, took: float) -> None:
    clock = ServerClock()
    for number in range(40):
        sent = 1_700_000_000 + number * 1.37
        written = sent + took / 2 + ahead
        clock.observe(_date(written), sent, sent + took)
    assert abs(_offset(clock) - ahead) <= 1 + took / 2
    if abs(ahead) < 0.5 and took < 1:
        assert abs(_offset(clock)) < 0.6


@pytest.mark.parametrize("date", [None, "", "soon", "Sat, 99 Nov 2026 00:00:00 GMT", "Mon, 30 Nov 2026 21:00:00"])
def test_an_answer_without_a_time_changes_nothing(date: str | None) -> None:
    clock = ServerClock()
    clock.observe(date, 0.0, 1.0)
    assert abs(_offset(clock)) < 0.1


@pytest.mark.parametrize("ahead", [-300, 300])
async def test_each_request_sets_the_clock(ahead: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        later = datetime.now(UTC) + timedelta(seconds=ahead)
        return web.json_response({"items": [], "metadata": {}}, headers={"Date": format_datetime(later, usegmt=True)})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = client.Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
    kube = KubeClient(client.ApiClient(configuration), RateLimiter(1e6, 1000), lambda *_: None)
    try:
        await kube.get("jobs", "team", "train-1")
        assert abs(_offset(kube.clock) - ahead) < 2
    finally:
        await kube.close()
        await runner.cleanup()


class _Cluster:
    """A client that stores one FineTuneJob, and counts what is created for it."""

    def __init__(self, body: Raw, *jobs: Raw) -> None:
        self.body = body
        self.jobs = jobs
        self.created: list[str] = []

    async def get(self, resource: str, namespace: str, name: str) -> Raw:
        if resource == "finetunejobs":
            return self.body
        raise NotFound(404, "NotFound", name)

    async def matching(self, resource: str, namespace: str, matches: Any) -> list[Raw]:
        return [entry for entry in self.jobs if matches(entry)] if resource == "jobs" else []

    async def create(self, resource: str, manifest: Raw) -> Raw:
        self.created.append(manifest["metadata"]["name"])
        return {**manifest, "metadata": {**manifest["metadata"], "uid": "new", "resourceVersion": "20"}}

    async def apply_status(self, namespace: str, name: str, version: str, status: Raw) -> Raw:
        meta = {**self.body["metadata"], "resourceVersion": str(int(version) + 1)}
        self.body = {**self.body, "metadata": meta, "status": status}
        return self.body


class _Silent:
    """A recorder that records nothing."""

    async def record(self, *_: Any) -> None:
        return None


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0], ids=["an hour behind", "equal", "an hour ahead"])
async def test_a_restart_is_not_delayed_by_a_wrong_clock(ahead: float) -> None:
    def of_the_server(seconds: float) -> str:
        return timestamp(datetime.now(UTC) + timedelta(seconds=ahead - seconds))

    body = job_body("train")
    body["metadata"] |= {"namespace": "team", "uid": "job-uid", "resourceVersion": "7", "generation": 1}
    body["status"] = {"phase": "Running", "attempt": 1, "observedGeneration": 1, "startTime": of_the_server(60)}
    ended = job(1, 1, ("Failed", "BackoffLimitExceeded", "x"))
    ended["metadata"]["creationTimestamp"] = of_the_server(50)
    ended["status"]["conditions"][0]["lastTransitionTime"] = of_the_server(1)
    cluster = _Cluster(body, ended)
    state = ControllerState(WorkQueue())
    state.clock.observe(_date(datetime.now(UTC).timestamp() + ahead), *[datetime.now(UTC).timestamp()] * 2)
    state.cache.put_body(body)
    state.cache.put_job(ended)
    state.cache.put_pod(pod("Failed", terminated(72)))
    settings = Settings.model_validate({"trainerImage": "example.test/trainer:1"})
    await Reconciler(cluster, state, settings, _Silent()).reconcile(("team", "train"))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert "train-2" in cluster.created
    assert seconds_between(cluster.body["status"]["startTime"], state.clock.now()) < 65
