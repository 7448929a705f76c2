"""Silent nodes, and what the operator does itself: neither is taken for something else."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from finetune_api.messages.result import Result
from finetune_api.reasons import REASONS
from finetune_api.status import Condition, FailureStatus, Phase, Restarts, Status
from finetune_operator.core import parsing
from finetune_operator.core.actions import CreateAttempt, CreatePreflight, Decision, DeleteJob, DesiredStatus
from finetune_operator.core.decide import blocked, decide
from finetune_operator.core.objects import Attempt, Observed
from finetune_operator.core.reduced_status import refused
from finetune_operator.core.status import status, timestamp
from finetune_operator.core.verdict import verdict
from k8s_operator.support.observed_states import (
    BEFORE,
    NOW,
    a_check,
    a_dead_pod,
    a_job,
    a_pod,
    an_attempt,
    an_observation,
    failed,
)

_PREEMPTED = Result(outcome="preempted", reason="Preempted")


def _desired(decision: Decision) -> DesiredStatus:
    assert decision.desired is not None
    return decision.desired


def _status(phase: Phase, attempt: int = 1, deed: str = "NotSuspended", **fields: Any) -> Status:
    condition = Condition(type="Suspended", status="False", last_transition_time=BEFORE, reason=deed)
    return Status(phase=phase, attempt=attempt, conditions=(condition,), **fields)


def _ago(seconds: float) -> str:
    return timestamp(NOW - timedelta(seconds=seconds))


def _written(observed: Observed, decision: Decision, now: datetime = NOW) -> Observed:
    """Return the observation after the decision's status was written."""
    after = status(observed, _desired(decision), now)
    return replace(observed, job=observed.job.model_copy(update={"status": after}))


# -- silent nodes ------


def _raw_pod(ready: str, containers: str) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "team", "name": "train-1-0", "uid": "pod-0", "resourceVersion": "1"},
        "spec": {"nodeName": "node-a"},
        "status": {
            "phase": "Running",
            "conditions": [
                {"type": "Ready", "status": ready, "lastTransitionTime": _ago(60)},
                {"type": "ContainersReady", "status": containers, "lastTransitionTime": BEFORE},
            ],
        },
    }


@pytest.mark.parametrize(
    ("ready", "containers", "since"), [("False", "True", _ago(60)), ("True", "True", ""), ("False", "False", "")]
)
def test_a_pod_that_only_the_node_controller_calls_unready_is_on_a_silent_node(
    ready: str, containers: str, since: str
) -> None:
    assert parsing.pod(_raw_pod(ready, containers)).silent_since == since


def test_a_silent_node_is_named_before_its_pod_is_lost() -> None:
    pod = a_pod(0, node="node-a", silent_since=_ago(60))
    decision = decide(an_observation(a_job(_status("Running")), an_attempt(1, pod)), NOW)
    desired = _desired(decision)
    assert decision.actions == ()
    assert (desired.phase, desired.reason) == ("Running", "NodeSilent")
    assert "node node-a doesn't answer" in desired.message
    assert decision.requeue_after == 240.0


@pytest.mark.parametrize(
    "fields",
    [
        {"silent_since": _ago(301)},
        {"deleting": True, "delete_by": _ago(61)},
        {"deleting": True, "delete_by": _ago(61), "disruption": "DeletionByTaintManager"},
    ],
    ids=["silent for too long", "deleted by force, which no kubelet carries out", "deleted by the taint manager"],
)
def test_a_lost_pod_costs_one_restart_and_its_job_is_removed_then(fields: dict[str, Any]) -> None:
    first = an_attempt(1, a_pod(0, node="node-a", **fields))
    decision = decide(an_observation(a_job(_status("Running")), first), NOW)
    failure = _desired(decision).failure
    assert failure is not None
    assert failure.reason == "NodeLost"
    assert decision.actions == (CreateAttempt(2, Restarts(infrastructure=1)),)
    second = an_attempt(2, a_pod(0), restarts=Restarts(infrastructure=1))
    after = decide(an_observation(a_job(_status("Restarting", 2)), first, second), NOW)
    assert [action.name for action in after.actions if isinstance(action, DeleteJob)] == ["train-1"]


def test_the_peers_of_a_lost_pod_are_stopped_first() -> None:
    pods = (a_pod(0, node="node-a", silent_since=_ago(301)), a_pod(1, node="node-b"))
    decision = decide(an_observation(a_job(_status("Running")), an_attempt(1, *pods)), NOW)
    assert [(a.name, a.wait) for a in decision.actions if isinstance(a, DeleteJob)] == [("train-1", True)]
    stopped = an_attempt(1, pods[0], a_dead_pod(1, 143, _PREEMPTED), deleting=True)
    decision = decide(an_observation(a_job(_status("Running")), stopped), NOW)
    assert decision.actions == (CreateAttempt(2, Restarts(infrastructure=1)),)


def test_a_pod_that_is_within_its_grace_period_is_not_lost() -> None:
    pod = a_pod(0, node="node-a", deleting=True, delete_by=_ago(-30))
    assert decide(an_observation(a_job(_status("Running")), an_attempt(1, pod)), NOW).actions == ()


def test_a_lost_orphan_delays_nothing() -> None:
    orphan = a_pod(0, node="node-a", silent_since=_ago(400))
    decision = decide(an_observation(a_job(_status("Running")), orphaned_pods=(orphan,)), NOW)
    assert decision.actions == (CreateAttempt(2, Restarts(infrastructure=1)),)


def test_an_ending_attempt_names_what_ended_it() -> None:
    outcome = verdict(an_attempt(1, a_dead_pod(0, 72, failed("RankKilled", "signal 9")), a_pod(1)))
    assert outcome.state == "ending"
    assert "RankKilled: pod train-1-0: signal 9" in outcome.message


# -- the operator's own deeds ------


def _policy(**fields: Any) -> dict[str, Any]:
    return {"run_policy": fields}


def test_a_resume_while_the_pods_still_stop_costs_nothing() -> None:
    stopping = an_attempt(1, a_pod(0, deleting=True), deleting=True)
    observed = an_observation(a_job(_status("Running", deed="Suspending")), stopping)
    observed = _written(observed, decide(observed, NOW))
    gone = replace(observed, attempts=())
    assert decide(gone, NOW).actions == (CreateAttempt(2, Restarts()),)


def test_a_deadline_that_is_raised_while_the_pods_stop_costs_nothing() -> None:
    late = a_job(_status("Running", start_time=_ago(100)), **_policy(activeDeadlineSeconds=60))
    observed = an_observation(late, an_attempt(1, a_pod(0)))
    decision = decide(observed, NOW)
    assert decision.status_first
    announced = _written(observed, decision).job.status
    raised = a_job(announced, generation=2, **_policy(activeDeadlineSeconds=600))
    assert decide(an_observation(raised), NOW).actions == (CreateAttempt(2, Restarts()),)


def test_a_quota_that_blocks_a_resumed_job_costs_nothing() -> None:
    observed = an_observation(a_job(_status("Suspended", deed="Suspended")))
    desired = blocked(observed, _desired(decide(observed, NOW)), "exceeded quota")
    after = status(observed, desired, NOW)
    assert after.phase == "Pending"
    assert decide(an_observation(a_job(after)), NOW).actions == (CreateAttempt(2, Restarts()),)


@pytest.mark.parametrize(
    ("pods_digest", "image", "pod", "is_replaced"),
    [
        ("new", "", a_pod(0, "Pending", waiting_reason="ImagePullBackOff"), True),
        ("new", "", a_pod(0, "Pending", unschedulable="no room"), True),
        ("same", "other", a_pod(0, "Pending", waiting_reason="ImagePullBackOff"), False),
        ("new", "", a_pod(0), False),
    ],
    ids=["waits for an image", "waits for a node", "unchanged", "has started"],
)
def test_pods_that_have_not_started_follow_the_spec_and_the_chart(
    pods_digest: str, image: str, pod: Any, is_replaced: bool
) -> None:
    attempt = an_attempt(1, pod, pods_digest="same", image="example.test/trainer:1")
    observed = an_observation(a_job(_status("Pending")), attempt, pods_digest=pods_digest, image=image)
    decision = decide(observed, NOW)
    assert [a.name for a in decision.actions if isinstance(a, DeleteJob)] == (["train-1"] if is_replaced else [])
    if is_replaced:
        gone = replace(_written(observed, decision), attempts=())
        assert decide(gone, NOW).actions == (CreateAttempt(2, Restarts()),)


def test_a_job_in_a_queue_keeps_its_place_when_only_the_chart_changes() -> None:
    attempt = an_attempt(1, suspended=True, pods_digest="spec.chart")
    observed = an_observation(a_job(_status("Queued")), attempt, pods_digest="spec.other")
    assert decide(observed, NOW).actions == ()
    changed = decide(replace(observed, pods_digest="other.chart"), NOW)
    assert [a.name for a in changed.actions if isinstance(a, DeleteJob)] == ["train-1"]


def test_a_check_on_a_lost_node_is_repeated() -> None:
    check = a_check(a_pod(0, node="node-a", silent_since=_ago(301)))
    decision = decide(an_observation(a_job(resources={"gpu": {}}), preflight=check), NOW)
    assert _desired(decision).phase == "Pending"
    assert [a.name for a in decision.actions if isinstance(a, DeleteJob)] == ["train-check"]


def test_a_reduced_status_still_knows_which_retry_has_had_its_effect() -> None:
    full = _status("Failed", retry=2, paused_seconds=30)
    less = refused(full, "413 too large")
    assert (less.retry, less.paused_seconds) == (2, 30)


def test_pods_of_an_older_version_follow_the_image_only() -> None:
    attempt = an_attempt(1, a_pod(0, "Pending"), image="example.test/trainer:1")
    observed = an_observation(a_job(_status("Pending")), attempt, pods_digest="new", image="example.test/trainer:1")
    assert decide(observed, NOW).actions == ()
    mended = replace(observed, image="example.test/trainer:2")
    assert [type(action) for action in decide(mended, NOW).actions] == [DeleteJob]


def test_a_check_that_has_not_started_follows_the_chart() -> None:
    check = a_check(a_pod(0, "Pending", waiting_reason="ErrImagePull"), pods_digest="old")
    decision = decide(an_observation(a_job(resources={"gpu": {}}), preflight=check, pods_digest="new"), NOW)
    assert [a.name for a in decision.actions if isinstance(a, DeleteJob)] == ["train-check"]


def test_a_job_that_somebody_else_suspends_names_them() -> None:
    queued = verdict(an_attempt(1, suspended=True, suspended_by="kueue-job-controller"))
    assert (queued.state, "was suspended by kueue-job-controller" in queued.message) == ("queued", True)
    ending = verdict(an_attempt(1, a_pod(0, deleting=True), suspended=True, suspended_by="kubectl-patch"))
    assert (ending.state, "was suspended by kubectl-patch" in ending.message) == ("ending", True)


@pytest.mark.parametrize("manager", ["kubectl-patch", "finetune-operator"])
def test_who_suspended_a_job_follows_from_its_managed_fields(manager: str) -> None:
    raw = {
        "metadata": {
            "name": "train-1", "namespace": "team", "uid": "u", "resourceVersion": "1",
            "managedFields": [
                {"manager": "kube-controller-manager", "time": BEFORE, "fieldsV1": {"f:status": {}}},
                {"manager": manager, "time": BEFORE, "fieldsV1": {"f:spec": {"f:suspend": {}}}},
            ],
        },
        "spec": {"suspend": True},
    }  # fmt: skip
    assert parsing.child_job(raw).suspended_by == ("" if manager == "finetune-operator" else manager)


# -- the deadline ------


@pytest.mark.parametrize(
    ("paused", "remaining"),
    [
        ({}, 60 - 20),
        ({"paused_seconds": 15}, 60 - 5),
        ({"paused_seconds": 5, "paused_since": _ago(10)}, 60 - 5),
    ],
    ids=["never paused", "paused before", "paused now"],
)
def test_the_time_of_a_pause_does_not_count_against_the_deadline(paused: dict[str, Any], remaining: float) -> None:
    job = a_job(_status("Running", start_time=_ago(20), **paused), **_policy(activeDeadlineSeconds=60))
    assert decide(an_observation(job, an_attempt(1, a_pod())), NOW).requeue_after == remaining


def test_pauses_add_up_in_status() -> None:
    suspended = _policy(suspend=True, activeDeadlineSeconds=60)
    observed = an_observation(a_job(_status("Running", start_time=_ago(20)), **suspended))
    paused = _written(observed, decide(observed, NOW)).job.status
    assert (paused.phase, paused.paused_since, paused.paused_seconds) == ("Suspended", timestamp(NOW), 0)
    later = NOW + timedelta(seconds=500)
    observed = an_observation(a_job(paused, generation=2, **_policy(activeDeadlineSeconds=60)))
    resumed = _written(observed, decide(observed, later), later).job.status
    assert (resumed.phase, resumed.paused_since, resumed.paused_seconds) == ("Starting", None, 500)


# -- trying again ------

_FAILURE = FailureStatus(reason="DiskFull", attempt=2)


def _failed_job(retry: int, served: int = 0, **fields: Any) -> Observed:
    before = _status(
        "Failed", 2, completion_time=_ago(50), start_time=_ago(100), failure=_FAILURE, retry=served, **fields
    )
    dead = an_attempt(2, a_dead_pod(0, 76), failed=True, restarts=Restarts(application=1))
    return an_observation(a_job(before, generation=2, **_policy(retry=retry)), dead)


def test_a_failed_job_is_tried_again_once_when_its_retry_is_raised() -> None:
    observed = _failed_job(1, restarts=Restarts(application=1))
    decision = decide(observed, NOW)
    assert (decision.status_first, _desired(decision).phase) == (True, "Restarting")
    announced = _written(observed, decision)
    reported = announced.job.status
    assert (reported.retry, reported.restarts, reported.completion_time) == (1, Restarts(), None)
    assert reported.paused_seconds == 50
    assert reported.failure == _FAILURE
    assert decide(announced, NOW).actions == (CreateAttempt(3, Restarts()),)


@pytest.mark.parametrize(("retry", "served"), [(0, 0), (1, 1), (1, 2)])
def test_a_failed_job_stays_failed_without_a_new_retry(retry: int, served: int) -> None:
    assert decide(_failed_job(retry, served), NOW) == Decision(None)


def test_a_retry_of_a_running_job_has_no_effect_now_or_later() -> None:
    observed = an_observation(a_job(_status("Running"), **_policy(retry=3)), an_attempt(1, a_pod()))
    written = _written(observed, decide(observed, NOW))
    assert written.job.status.retry == 3
    dead: Attempt = an_attempt(1, a_dead_pod(0, 65, failed("DatasetInvalid")), failed=True)
    ended = replace(written, attempts=(dead,))
    ended = _written(ended, decide(ended, NOW))
    assert (ended.job.status.phase, decide(ended, NOW)) == ("Failed", Decision(None))


def test_a_job_whose_check_failed_is_checked_again() -> None:
    check = a_check(a_dead_pod(0, 68, failed("AccessDenied")), failed=True)
    before = _status("Failed", 0, completion_time=_ago(50))
    job = a_job(before, resources={"gpu": {}}, **_policy(retry=1))
    observed = an_observation(job, preflight=check)
    announced = _written(observed, decide(observed, NOW))
    deleting = decide(announced, NOW)
    assert [a.name for a in deleting.actions if isinstance(a, DeleteJob)] == ["train-check"]
    gone = replace(_written(announced, deleting), preflight=None)
    assert decide(gone, NOW).actions == (CreatePreflight(),)


def test_a_full_disk_says_how_much_would_be_enough() -> None:
    dead = an_attempt(1, a_dead_pod(0, 76, failed("DiskFull", "no space")), failed=True)
    desired = _desired(decide(an_observation(a_job(_status("Running"), resources={"scratch": "1Gi"}), dead), NOW))
    assert (desired.phase, desired.message) == (
        "Failed",
        "pod train-1-0: no space; resources.scratch is 1Gi, and auto would be 20Gi",
    )


def test_preemptions_have_a_generous_budget() -> None:
    def after(restarts: int) -> Decision:
        preempted = an_attempt(
            3, a_dead_pod(0, 143, _PREEMPTED), failed=True, restarts=Restarts(preemption=restarts), finished_at=BEFORE
        )
        return decide(an_observation(a_job(_status("Running", 3)), preempted), NOW + timedelta(hours=1))

    assert after(999).actions == (CreateAttempt(4, Restarts(preemption=1000)),)
    assert _desired(after(1000)).reason == "RestartBudgetSpent"


@pytest.mark.parametrize(
    ("cause", "reason", "limit"), [("infrastructure", "RankKilled", 0), ("preemption", "Evicted", 2)]
)
def test_a_spent_budget_is_named_and_its_hint_leads_on(cause: str, reason: str, limit: int) -> None:
    dead = a_dead_pod(0, 72, failed(reason, "signal 9"))
    ended = an_attempt(3, dead, failed=True, restarts=Restarts(**{cause: limit}))
    job = a_job(_status("Running", 3), **_policy(maxRestarts={cause: limit}))
    desired = _desired(decide(an_observation(job, ended), NOW))
    assert (desired.phase, desired.reason) == ("Failed", "RestartBudgetSpent")
    assert desired.message == f"runPolicy.maxRestarts.{cause} is {limit}; pod train-1-0: signal 9"
    assert desired.failure is not None
    assert (desired.failure.reason, desired.failure.message) == (reason, "pod train-1-0: signal 9")
    assert f"runPolicy.maxRestarts.{cause} is {limit}. Raise runPolicy.retry" in desired.failure.hint
    assert "Nothing to do" not in desired.failure.hint


@pytest.mark.parametrize("paused", ["Queued", "Suspended"])
def test_a_pause_that_ends_in_a_failure_does_not_count_against_the_deadline_of_a_retry(paused: Phase) -> None:
    before = _status(paused, start_time=_ago(500), paused_since=_ago(400), paused_seconds=7)
    observed = an_observation(a_job(before), an_attempt(1, a_dead_pod(0, 65, failed("DatasetInvalid")), failed=True))
    ended = _written(observed, decide(observed, NOW)).job.status
    assert (ended.phase, ended.paused_seconds, ended.paused_since) == ("Failed", 407, None)


def test_a_pod_that_outlives_its_deletion_on_a_node_that_answers_is_told_apart() -> None:
    overdue = a_pod(0, node="node-a", deleting=True, delete_by=_ago(61))
    failure = _desired(decide(an_observation(a_job(_status("Running")), an_attempt(1, overdue)), NOW)).failure
    assert failure is not None
    assert failure.message == (
        f"pod train-1-0: its node node-a hasn't removed it, although its grace period was over at {_ago(61)}"
    )


def test_a_check_that_runs_out_of_memory_names_the_memory_of_checks() -> None:
    check = a_check(a_dead_pod(0, 137, reason="OOMKilled"), failed=True)
    failure = _desired(decide(an_observation(a_job(resources={"gpu": {}}), preflight=check), NOW)).failure
    assert failure is not None
    assert "pods.preflightMemory" in failure.hint
    assert "micro-batches" not in failure.hint


@pytest.mark.parametrize("place", ["the first attempt", "a check"])
@pytest.mark.parametrize("reason", REASONS)
def test_each_way_in_which_a_job_fails_has_a_way_on(reason: str, place: str) -> None:
    dead = a_dead_pod(0, 1, failed(reason))
    budgets = {"application": 0, "memory": 0, "infrastructure": 0, "preemption": 0}
    if place == "a check":
        job = a_job(_status("Pending", 0), resources={"gpu": {}}, **_policy(maxRestarts=budgets))
        observed = an_observation(job, preflight=a_check(dead, failed=True))
    else:
        observed = an_observation(
            a_job(_status("Running"), **_policy(maxRestarts=budgets)), an_attempt(1, dead, failed=True)
        )
    after = _written(observed, decide(observed, NOW)).job.status
    assert (after.phase, after.reason) == ("Failed", reason)
    assert after.failure is not None
    assert "runPolicy.retry" in after.failure.hint or "reate a job" in after.failure.hint
    assert "Nothing to do" not in after.failure.hint
    assert len(after.message) <= 110
    assert len(after.failure.hint) < 1000
