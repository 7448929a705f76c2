"""A job is reconciled for each report that it posts, soon and not too often."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.workqueue import WorkQueue
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.leader_election import Leadership
from finetune_operator.kube.rate_limiter import RateLimiter
from finetune_operator.servers.progress_server import ProgressServer
from finetune_operator.settings import Identity, LeaderElectionSettings, ProgressSettings

_KEY = ("team", "train")
_INTERVAL_SECONDS = 0.3


async def _seconds_until_queued(posts: tuple[tuple[float, bool], ...], wait: float) -> list[float]:
    """Posts reports at some seconds, each news or not. Returns when the job is reconciled."""
    queue = WorkQueue()
    no_api: Any = None  # nothing is sent
    client = KubeClient(no_api, RateLimiter(1, 1), lambda *_: None)
    leadership = Leadership(client, LeaderElectionSettings(enabled=False), Identity())
    settings = ProgressSettings(write_every_seconds=3 * _INTERVAL_SECONDS)
    server = ProgressServer(client, ControllerState(queue), leadership, settings, lambda _: None)
    begin, times = time.monotonic(), []

    async def work() -> None:
        while True:
            key = await queue.take()
            times.append(time.monotonic() - begin)
            queue.done(key)

    worker = asyncio.create_task(work())
    for second, is_news in posts:
        await asyncio.sleep(begin + second - time.monotonic())
        server._enqueue(_KEY, "uid", is_news)
    await asyncio.sleep(begin + wait - time.monotonic())
    worker.cancel()
    return times


def test_a_report_soon_after_another_one_has_its_turn_even_if_none_follows() -> None:
    first, second = asyncio.run(_seconds_until_queued(((0.0, False), (0.05, False)), wait=0.6))
    assert first < 0.2
    assert second >= _INTERVAL_SECONDS - 0.01


def test_reports_that_follow_each_other_share_a_turn_and_news_has_its_own() -> None:
    posts = tuple((0.02 * number, number == 5) for number in range(25))
    times = asyncio.run(_seconds_until_queued(posts, wait=0.9))
    assert len(times) in (3, 4)
