"""A group of which only a part can be scheduled gives its nodes back and tries again."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api import names
from finetune_api.status import Restarts
from finetune_operator.core.actions import ReleaseGroup, ResumeGroup
from finetune_operator.core.decide import decide
from finetune_operator.core.objects import Attempt, Pod
from finetune_operator.core.parsing import child_job
from finetune_operator.core.plan import plan
from finetune_operator.core.pods import manifests
from finetune_operator.settings import Settings
from k8s_operator.support.observed_states import NOW, a_job, a_pod, an_attempt, an_observation

_GROUP = {"distribution": {"nodes": 4}, "run_policy": {"schedulingTimeoutSeconds": 60}}


def _scheduled(index: int, seconds_ago: float = 0) -> Pod:
    time = (NOW - timedelta(seconds=seconds_ago)).isoformat()
    return a_pod(index, "Pending", node=f"node-{index}", scheduled_at=time)


def _unscheduled(index: int) -> Pod:
    return a_pod(index, "Pending", unschedulable="0/6 nodes are available: 6 Insufficient nvidia.com/gpu")


def _decide(attempt: Attempt, **run_policy: Any) -> Any:
    job = a_job(**{**_GROUP, "run_policy": {**_GROUP["run_policy"], **run_policy}})
    return decide(an_observation(job, attempt), NOW)


def test_a_part_of_a_group_gives_its_nodes_back_after_the_timeout() -> None:
    attempt = an_attempt(1, *(_scheduled(index, 91) for index in range(3)), _unscheduled(3))
    decision = _decide(attempt)
    (action,) = decision.actions
    assert action == ReleaseGroup("train-1", "child-1", "1", 1, NOW)
    assert decision.desired.phase == "Pending"
    assert "6 Insufficient nvidia.com/gpu; 3 of 4 pods have nodes; they give them back" in decision.desired.message
    assert decision.desired.restarts == Restarts()


def test_the_timeout_counts_from_the_last_pod_that_got_a_node_and_is_extended_by_at_most_a_half() -> None:
    attempt = an_attempt(1, _scheduled(0, 600), _scheduled(1, 10), _unscheduled(2), _unscheduled(3))
    decision = _decide(attempt)
    assert decision.actions == ()
    assert 50 <= decision.requeue_after <= 80
    assert "which they give back at 03:0" in decision.desired.message


@pytest.mark.parametrize(
    "pods",
    [
        [_unscheduled(index) for index in range(4)],
        [_scheduled(index, 1000) for index in range(4)],
    ],
    ids=["no pod holds a node", "an image that takes long to pull"],
)
def test_other_waits_are_no_reason_to_start_again(pods: list[Pod]) -> None:
    decision = _decide(an_attempt(1, *pods))
    assert decision.actions == ()
    assert decision.requeue_after is None


@pytest.mark.parametrize("policy", [{"schedulingTimeoutSeconds": 0}, {"queueName": "team"}], ids=["never", "a queue"])
def test_no_group_is_released_if_a_queue_admits_it_or_the_timeout_is_off(policy: dict[str, Any]) -> None:
    attempt = an_attempt(1, *(_scheduled(index, 10000) for index in range(3)), _unscheduled(3))
    assert _decide(attempt, **policy).actions == ()


def _released(seconds_ago: float, releases: int) -> Attempt:
    attempt = an_attempt(1, suspended=True, releases=releases, expected_pods=4)
    time = (NOW - timedelta(seconds=seconds_ago)).isoformat()
    return Attempt(replace(attempt.job, released_at=time), ())


def test_the_back_off_grows_and_status_says_when_the_next_try_starts() -> None:
    waits = [_decide(_released(0, releases)).requeue_after for releases in (1, 2, 3, 10)]
    assert [shortest <= wait <= 1.5 * shortest for wait, shortest in zip(waits, (10, 20, 40, 300), strict=True)] == (
        [True] * 4
    )
    desired = _decide(_released(0, 2)).desired
    assert desired.phase == "Queued"
    assert desired.message.startswith("the next try starts at 03:04:")
    assert "given back 2 times" in desired.message
    assert "runPolicy.queueName" in desired.message


def test_a_released_group_is_created_again_after_its_back_off() -> None:
    assert _decide(_released(500, 3)).actions == (ResumeGroup("train-1", "child-1", "1"),)


def test_a_job_that_a_queue_has_suspended_is_never_resumed_by_the_operator() -> None:
    assert _decide(an_attempt(1, suspended=True, expected_pods=4)).actions == ()


def test_a_released_group_is_recognized_from_its_job() -> None:
    job = a_job(**_GROUP)
    body = manifests.attempt_job(job, plan(job, Settings()), Settings(), Restarts())
    body["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    body["metadata"]["annotations"] |= {
        names.ANNOTATION_RELEASED_AT: "2026-01-02T03:00:00Z",
        names.ANNOTATION_RELEASES: "2",
    }
    body["spec"]["suspend"] = True
    parsed = child_job(body)
    assert (parsed.suspended, parsed.released_at, parsed.releases) == (True, "2026-01-02T03:00:00Z", 2)
    body["metadata"]["annotations"][names.ANNOTATION_RELEASES] = "many"
    assert child_job(body).releases == 0


def test_a_jobs_own_scheduler_is_for_its_training_pods_only() -> None:
    job = a_job(pod={"schedulerName": "volcano"})
    run = plan(job, Settings())
    attempt = manifests.attempt_job(job, run, Settings(), Restarts())
    assert attempt["spec"]["template"]["spec"]["schedulerName"] == "volcano"
    assert "schedulerName" not in manifests.preflight_job(job, run, Settings())["spec"]["template"]["spec"]


def test_a_job_for_a_queue_is_created_suspended_and_its_check_is_not_queued() -> None:
    job = a_job(run_policy={"queueName": "team"}, resources={"gpu": {}})
    run = plan(job, Settings())
    attempt = manifests.attempt_job(job, run, Settings(), Restarts())
    assert attempt["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert attempt["spec"]["suspend"] is True
    check = manifests.preflight_job(job, run, Settings())
    assert "kueue.x-k8s.io/queue-name" not in check["metadata"]["labels"]
    assert "suspend" not in check["spec"]
    plain = a_job()
    unqueued = manifests.attempt_job(plain, plan(plain, Settings()), Settings(), Restarts())
    assert "suspend" not in unqueued["spec"]
