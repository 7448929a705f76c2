"""One worker a job at a time, and a cache that news can reach in any order."""

from __future__ import annotations

import asyncio
from typing import Any

from controller.world import job_body
from finetune_api import names
from finetune_operator.cache import Cache
from finetune_operator.queue import Queue
from finetune_operator.throttle import ORDINARY, URGENT, Throttle

_A, _B = ("team", "a"), ("team", "b")


async def test_a_job_waits_once_however_often_it_is_added() -> None:
    queue = Queue()
    for _ in range(3):
        queue.add(_A)
    assert len(queue) == 1


async def test_a_job_that_is_added_while_worked_on_is_worked_on_once_more_afterwards() -> None:
    queue = Queue()
    queue.add(_A)
    assert await queue.take() == _A
    queue.add(_A)
    queue.add(_B)
    assert await queue.take() == _B
    assert len(queue) == 0
    queue.done(_A)
    assert await asyncio.wait_for(queue.take(), 1) == _A


async def test_the_earliest_of_several_timers_rings() -> None:
    queue = Queue()
    queue.add_after(_A, 60)
    queue.add_after(_A, 0.01)
    queue.add_after(_A, 60)
    assert await asyncio.wait_for(queue.take(), 1) == _A


async def test_failures_come_back_later_and_later() -> None:
    queue = Queue()
    delays = []
    for _ in range(4):
        queue.add(_A)
        await queue.take()
        delays.append(queue.failed(_A))
    assert delays[3] > delays[0]
    assert 0.05 <= delays[0] <= 0.1


async def test_the_creation_of_pods_goes_before_status_when_requests_are_scarce() -> None:
    throttle = Throttle(rate=50, burst=1)
    order: list[str] = []

    async def send(name: str, priority: int) -> None:
        await throttle.acquire(priority)
        order.append(name)

    await send("first", ORDINARY)
    await asyncio.gather(send("status", ORDINARY), send("status", ORDINARY), send("pods", URGENT))
    assert order == ["first", "pods", "status", "status"]


async def test_requests_are_spread_over_time() -> None:
    throttle = Throttle(rate=100, burst=5)
    loop = asyncio.get_running_loop()
    started = loop.time()
    for _ in range(15):
        await throttle.acquire()
    assert loop.time() - started >= 0.08


def _body(version: int, uid: str = "u1") -> dict[str, Any]:
    body = job_body("a")
    body["metadata"] |= {"namespace": "team", "uid": uid, "resourceVersion": str(version)}
    return body


def _child(version: int, uid: str = "j1", owner: str = "u1") -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "team",
            "name": "a-1",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {names.LABEL_ROLE: names.ROLE_TRAINER, names.LABEL_ATTEMPT: "1", names.LABEL_JOB_UID: "u1"},
            "ownerReferences": [{"kind": names.KIND, "uid": owner, "controller": True}],
        },
    }


def _pod(version: int, phase: str = "Running", job: str = "j1") -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "team",
            "name": "a-1-0",
            "uid": "p1",
            "resourceVersion": str(version),
            "labels": {names.LABEL_JOB_UID: "u1"},
            "ownerReferences": [{"kind": "Job", "uid": job, "controller": True}],
        },
        "status": {"phase": phase},
    }


def _filled() -> Cache:
    cache = Cache()
    cache.put_body(_body(1))
    cache.put_job(_child(2))
    cache.put_pod(_pod(3))
    return cache


def test_children_are_matched_by_their_owners_uid_and_not_by_label() -> None:
    cache = _filled()
    cache.put_job(_child(9, uid="foreign", owner="somebody-else"))
    family = cache.family(_A)
    assert family is not None
    assert [attempt.job.uid for attempt in family.attempts] == ["j1"]
    assert [pod.uid for pod in family.attempts[0].pods] == ["p1"]


def test_old_news_never_replaces_new_ones() -> None:
    cache = _filled()
    cache.put_body(_body(5))
    cache.put_body(_body(4))
    cache.put_pod(_pod(8, "Failed"))
    cache.put_pod(_pod(7, "Running"))
    family = cache.family(_A)
    assert family is not None
    assert family.resource_version == "5"
    assert family.attempts[0].pods[0].phase == "Failed"


def test_a_deleted_pods_last_word_is_kept_while_its_job_exists() -> None:
    cache = _filled()
    cache.drop_pod("p1", _pod(9, "Failed"))
    family = cache.family(_A)
    assert family is not None
    assert (family.attempts[0].pods[0].gone, family.attempts[0].pods[0].phase) == (True, "Failed")
    cache.drop_job("j1")
    assert cache.sizes() == {"finetunejobs": 1, "jobs": 0, "pods": 0}


def test_a_live_pod_whose_job_is_gone_is_a_stray() -> None:
    cache = _filled()
    cache.drop_job("j1")
    family = cache.family(_A)
    assert family is not None
    assert [pod.name for pod in family.strays] == ["a-1-0"]


def test_a_late_deletion_of_a_predecessor_leaves_its_successor_alone() -> None:
    cache = _filled()
    cache.put_body(_body(7, uid="u2"))
    cache.drop_body(_body(6, uid="u1"))
    family = cache.family(_A)
    assert family is not None
    assert family.uid == "u2"
    assert family.attempts == ()


def test_a_sweep_forgets_what_it_no_longer_finds() -> None:
    cache = _filled()
    known = cache.uids()
    assert known == {"finetunejobs": {"u1"}, "jobs": {"j1"}, "pods": {"p1"}}
    assert cache.drop_missing("pods", {"p1"}) == {_A}
    assert cache.drop_missing("finetunejobs", {"u1"}) == {_A}
    assert cache.family(_A) is None
