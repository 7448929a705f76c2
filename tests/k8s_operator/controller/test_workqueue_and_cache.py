"""Each job has at most one worker at a time, and the cache accepts updates in any order."""

from __future__ import annotations

import asyncio
from typing import Any

from finetune_api import names
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.snapshot import Key
from finetune_operator.controller.workqueue import WorkQueue, WriteTurns
from finetune_operator.kube.rate_limiter import ORDINARY, URGENT, RateLimiter
from k8s_operator.support.kubelet_stand_in import job_body

_A, _B = ("team", "a"), ("team", "b")


async def test_a_job_is_queued_once_even_if_it_is_added_several_times() -> None:
    queue = WorkQueue()
    for _ in range(3):
        queue.add(_A)
    assert len(queue) == 1


async def test_a_job_that_is_added_while_it_is_processed_is_processed_once_more_afterwards() -> None:
    queue = WorkQueue()
    queue.add(_A)
    assert await queue.take() == _A
    queue.add(_A)
    queue.add(_B)
    assert await queue.take() == _B
    assert len(queue) == 0
    queue.done(_A)
    assert await asyncio.wait_for(queue.take(), 1) == _A


async def test_a_namespace_with_many_jobs_doesnt_delay_the_jobs_of_others() -> None:
    queue = WorkQueue()
    flood = [("flood", str(number)) for number in range(1000)]
    for key in flood:
        queue.add(key)
    assert await queue.take() == flood[0]
    queue.add(_A)
    queue.add(_B)
    queue.add(("other", "c"))
    taken = [await queue.take() for _ in range(8)]
    assert [key for key in taken if key[0] != "flood"] == [_A, ("other", "c"), _B]
    assert [key for key in taken if key[0] == "flood"] == flood[1:6]
    assert len(queue) == 1000 + 3 - 9


async def test_the_earliest_of_several_timers_fires() -> None:
    queue = WorkQueue()
    queue.add_after(_A, 60)
    queue.add_after(_A, 0.01)
    queue.add_after(_A, 60)
    assert await asyncio.wait_for(queue.take(), 1) == _A


async def test_failures_are_retried_with_growing_delays() -> None:
    queue = WorkQueue()
    delays = []
    for _ in range(4):
        queue.add(_A)
        await queue.take()
        delays.append(queue.failed(_A))
    assert delays[3] > delays[0]
    assert 0.05 <= delays[0] <= 0.1


async def test_the_creation_of_pods_precedes_status_writes_if_requests_are_scarce() -> None:
    throttle = RateLimiter(rate=50, burst=1)
    order: list[str] = []

    async def send(name: str, priority: int) -> None:
        await throttle.acquire(priority)
        order.append(name)

    await send("first", ORDINARY)
    await asyncio.gather(send("status", ORDINARY), send("status", ORDINARY), send("pods", URGENT))
    assert order == ["first", "pods", "status", "status"]


async def test_requests_are_spread_over_time() -> None:
    throttle = RateLimiter(rate=100, burst=5)
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
            "ownerReferences": [
                {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "a", "uid": owner, "controller": True}
            ],
        },
    }


def _pod(version: int, phase: str = "Running", job: str = "j1") -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "team",
            "name": "a-1-0",
            "uid": "p1",
            "resourceVersion": str(version),
            "labels": {**names.WATCHED_LABELS, names.LABEL_JOB_UID: "u1"},
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": "a-1", "uid": job, "controller": True}
            ],
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
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert [attempt.job.uid for attempt in snapshot.attempts] == ["j1"]
    assert [pod.uid for pod in snapshot.attempts[0].pods] == ["p1"]


def test_an_old_version_never_replaces_a_newer_one() -> None:
    cache = _filled()
    cache.put_body(_body(5))
    cache.put_body(_body(4))
    cache.put_pod(_pod(8, "Failed"))
    cache.put_pod(_pod(7, "Running"))
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert snapshot.resource_version == "5"
    assert snapshot.attempts[0].pods[0].phase == "Failed"


def test_a_deleted_pods_last_status_is_kept_while_its_job_exists() -> None:
    cache = _filled()
    cache.drop_pod("p1", _pod(9, "Failed"))
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert (snapshot.attempts[0].pods[0].gone, snapshot.attempts[0].pods[0].phase) == (True, "Failed")
    cache.drop_job("j1")
    assert cache.sizes() == {"finetunejobs": 1, "jobs": 0, "pods": 0}


def test_a_live_pod_whose_job_is_gone_is_orphaned() -> None:
    cache = _filled()
    cache.drop_job("j1")
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert [pod.name for pod in snapshot.orphaned_pods] == ["a-1-0"]


def test_a_late_deletion_of_a_predecessor_leaves_its_successor_alone() -> None:
    cache = _filled()
    cache.put_body(_body(7, uid="u2"))
    cache.drop_body(_body(6, uid="u1"))
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert snapshot.uid == "u2"
    assert snapshot.attempts == ()


def test_a_live_pod_of_a_predecessor_is_orphaned_until_it_is_gone() -> None:
    cache = Cache()
    pod = _pod(3)
    pod["metadata"]["name"] = "a-1-0-x7k2p"
    cache.put_pod(pod)
    stranger = _pod(3, job="j9")
    stranger["metadata"] |= {"name": "a-b-1-0-x7k2p", "uid": "p2"}
    cache.put_pod(stranger)
    cache.put_body(_body(7, uid="u2"))
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert [pod.name for pod in snapshot.orphaned_pods] == ["a-1-0-x7k2p"]
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert cache.drop_pod("p1", pod) == _A  # so that the job is reconciled
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert snapshot.orphaned_pods == ()


def test_a_resync_drops_what_no_longer_exists() -> None:
    cache = _filled()
    known = cache.uids()
    assert known == {"finetunejobs": {"u1"}, "jobs": {"j1"}, "pods": {"p1"}}
    assert cache.drop_missing("pods", {"p1"}) == {_A}
    assert cache.drop_missing("finetunejobs", {"u1"}) == {_A}
    assert cache.snapshot(_A) is None


def test_a_late_response_does_not_bring_deleted_objects_back() -> None:
    """A list that began before a deletion may arrive after its watch event."""
    cache = _filled()
    deleted = _pod(6)
    deleted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    cache.drop_pod("p1", deleted)
    cache.drop_job("j1", _child(7))
    cache.put_job(_child(4))
    cache.put_pod(_pod(5))
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert (snapshot.attempts, snapshot.orphaned_pods) == ((), ())
    cache.drop_body(_body(8))
    cache.put_body(_body(1))
    assert cache.snapshot(_A) is None


def test_a_running_pod_that_nobody_deleted_counts_as_running_until_it_was_looked_up() -> None:
    """A watch with a selector reports a pod as deleted when somebody removes its label."""
    cache = _filled()
    cache.drop_pod("p1", _pod(6))
    cache.drop_job("j1", _child(7))
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert [(pod.uid, pod.unwatched) for pod in snapshot.pods] == [("p1", True)]
    cache.drop_pod("p1")
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert snapshot.pods == ()


def test_an_older_report_of_a_deletion_does_not_replace_a_newer_one() -> None:
    """A read that fails with 404 reports the deletion with the version that was cached."""
    cache = _filled()
    cache.drop_body(_body(8))
    cache.drop_body(_body(1))
    cache.put_body(_body(5))
    assert cache.snapshot(_A) is None


def test_an_object_that_appears_again_after_its_deletion_event_is_cached() -> None:
    """A watch with a selector reports an object as deleted when it loses the label."""
    cache = _filled()
    cache.drop_job("j1", _child(7))
    cache.put_job(_child(8))
    snapshot = cache.snapshot(_A)
    assert snapshot is not None
    assert [attempt.job.uid for attempt in snapshot.attempts] == ["j1"]


def test_deletions_are_forgotten_at_the_second_resync_after_them() -> None:
    cache = _filled()
    cache.drop_job("j1", _child(7))
    cache.forget_deletions()
    assert cache.put_job(_child(4)) is None
    cache.forget_deletions()
    assert cache.put_job(_child(4)) == _A


async def _order_of_writes(jobs: int, limit: int, nothing_to_write: frozenset[Key] = frozenset()) -> list[Key]:
    """Reconciles jobs that all want to write at once, by more workers than may write."""
    queue = WorkQueue()
    turns = WriteTurns(queue, limit)
    writing = 0
    written: list[Key] = []

    async def work() -> None:
        nonlocal writing
        while True:
            key = await queue.take()
            if key in written or (key in nothing_to_write and len(written) >= limit):
                pass
            elif turns.begin(key):
                writing += 1
                assert writing <= limit
                await asyncio.sleep(0.001)
                writing -= 1
                written.append(key)
                turns.end()
            turns.next()
            queue.done(key)

    for number in range(jobs):
        queue.add(("team", str(number)))
    workers = [asyncio.create_task(work()) for _ in range(2 * limit + 1)]
    await asyncio.sleep(0.02 + 0.005 * jobs)
    for worker in workers:
        worker.cancel()
    return written


async def test_jobs_write_in_turns_and_none_is_left_out() -> None:
    written = await _order_of_writes(jobs=20, limit=2)
    assert sorted(written) == sorted(("team", str(number)) for number in range(20))


async def test_a_job_that_has_nothing_to_write_when_it_is_its_turn_lets_the_next_one_write() -> None:
    idle = frozenset(("team", str(number)) for number in range(2, 12))
    written = await _order_of_writes(jobs=20, limit=2, nothing_to_write=idle)
    assert set(written) >= {("team", str(number)) for number in range(20)} - idle
