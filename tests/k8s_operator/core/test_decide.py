"""What the operator decides from an observed state. Decisions are pure functions, so each case of a
job's life takes a few lines."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.status import Condition, Phase, Restarts, Status
from finetune_operator.core import parsing
from finetune_operator.core.actions import CreateAttempt, CreatePreflight, Decision, DeleteJob, DesiredStatus
from finetune_operator.core.decide import blocked, decide, failed_to_start
from finetune_operator.core.objects import Observed
from k8s_operator.support.observed_states import (
    BEFORE,
    NOW,
    a_check,
    a_dead_pod,
    a_done_pod,
    a_job,
    a_pod,
    an_attempt,
    an_observation,
    failed,
)

_GPU: dict[str, Any] = {"resources": {"gpu": {}}}
_SUSPEND: dict[str, Any] = {"run_policy": {"suspend": True}}


def _desired(decision: Decision) -> DesiredStatus:
    assert decision.desired is not None
    return decision.desired


def _status(phase: Phase, attempt: int = 1, suspended: str = "NotSuspended", **fields: Any) -> Status:
    condition = Condition(type="Suspended", status="False", last_transition_time=BEFORE, reason=suspended)
    return Status(phase=phase, attempt=attempt, conditions=(condition,), **fields)


def _deletes(decision: Decision) -> list[str]:
    return [action.name for action in decision.actions if isinstance(action, DeleteJob)]


def test_a_new_job_gets_its_pods_immediately() -> None:
    decision = decide(an_observation(), NOW)
    assert decision.actions == (CreateAttempt(1, Restarts()),)
    assert (_desired(decision).phase, _desired(decision).attempt) == ("Starting", 1)


def test_a_job_with_gpus_has_its_inputs_checked_first() -> None:
    decision = decide(an_observation(a_job(**_GPU)), NOW)
    assert decision.actions == (CreatePreflight(),)
    assert (_desired(decision).phase, _desired(decision).attempt) == ("Pending", 0)


@pytest.mark.parametrize(
    ("check", "actions", "phase"),
    [
        (a_check(a_pod()), (), "Pending"),
        (a_check(a_done_pod(), complete=True), (CreateAttempt(1, Restarts()),), "Starting"),
        (a_check(a_dead_pod(0, 66, failed("ModelNotFound")), failed=True), (), "Failed"),
        (a_check(a_dead_pod(0, 74, failed("StorageUnavailable")), failed=True), (), "Failed"),
        (a_check(a_dead_pod(0, 74), a_pod(0, "Pending")), (), "Pending"),
    ],
    ids=["running", "passed", "user's mistake", "its own retries spent", "being retried"],
)
def test_the_check_decides_whether_gpus_are_allocated(check: Any, actions: Any, phase: str) -> None:
    decision = decide(an_observation(a_job(**_GPU), preflight=check), NOW)
    assert decision.actions == actions
    assert _desired(decision).phase == phase


def test_no_check_is_repeated_once_an_attempt_exists() -> None:
    decision = decide(an_observation(a_job(_status("Running"), **_GPU), an_attempt(1, a_pod())), NOW)
    assert decision.actions == ()
    assert _desired(decision).phase == "Running"


@pytest.mark.parametrize(
    ("reason", "restarts", "then"),
    [
        ("DatasetInvalid", Restarts(), None),
        ("InsufficientMemory", Restarts(), None),
        ("TrainingError", Restarts(), Restarts(application=1)),
        ("TrainingError", Restarts(application=1), None),
        ("OutOfMemory", Restarts(), Restarts(memory=1)),
        ("OutOfMemory", Restarts(application=1), Restarts(application=1, memory=1)),
        ("OutOfMemory", Restarts(memory=3), Restarts(memory=4)),
        ("OutOfMemory", Restarts(memory=4), None),
        ("TrainingError", Restarts(memory=4), Restarts(application=1, memory=4)),
        ("RankKilled", Restarts(application=1), Restarts(application=1, infrastructure=1)),
        ("RankKilled", Restarts(infrastructure=20), None),
        ("Preempted", Restarts(preemption=500), Restarts(preemption=501)),
        ("SomethingNewer", Restarts(), Restarts(infrastructure=1)),
    ],
)
def test_a_failed_attempt_costs_its_causes_budget(reason: str, restarts: Restarts, then: Restarts | None) -> None:
    dead = a_dead_pod(0, 1, failed(reason) if reason != "Preempted" else Result(outcome="preempted"))
    attempt = an_attempt(3, dead, failed=True, restarts=restarts, finished_at=BEFORE)
    later = NOW + timedelta(hours=1)
    decision = decide(an_observation(a_job(_status("Running", 3)), attempt), later)
    assert decision.actions == ((CreateAttempt(4, then),) if then else ())
    assert _desired(decision).phase == ("Restarting" if then else "Failed")
    failure = _desired(decision).failure
    assert failure is not None
    assert (failure.reason, failure.attempt) == (reason, 3)


def test_a_container_that_the_kernel_killed_for_memory_costs_the_memory_budget() -> None:
    attempt = an_attempt(
        1, a_dead_pod(0, 137, reason="OOMKilled"), failed=True, restarts=Restarts(), finished_at=BEFORE
    )
    for limit, then in ((1, (CreateAttempt(2, Restarts(memory=1)),)), (0, ())):
        policy = {"maxRestarts": {"memory": limit, "application": 0}}
        observed = an_observation(a_job(_status("Running"), run_policy=policy), attempt)
        decision = decide(observed, NOW + timedelta(hours=1))
        assert decision.actions == then


def test_counters_of_an_older_version_have_no_memory_restarts() -> None:
    raw = {
        "metadata": {
            "name": "train-3",
            "namespace": "ns",
            "uid": "u",
            "resourceVersion": "1",
            "annotations": {names.ANNOTATION_RESTARTS: '{"application": 1, "infrastructure": 2, "preemption": 3}'},
        }
    }
    older = Restarts(application=1, infrastructure=2, preemption=3, memory=0)
    assert parsing.child_job(raw).restarts == older
    assert (
        Status.model_validate({"restarts": {"application": 1, "infrastructure": 2, "preemption": 3}}).restarts == older
    )


def test_restarts_have_growing_delays_but_none_after_a_long_life() -> None:
    def wait(restarts: int, lived: int) -> float | None:
        born, died = NOW - timedelta(seconds=lived), NOW
        dead = an_attempt(
            2,
            a_dead_pod(0, 72, failed("RankKilled")),
            failed=True,
            restarts=Restarts(infrastructure=restarts),
            created=born.isoformat(),
            finished_at=died.isoformat(),
        )
        return decide(an_observation(a_job(_status("Running", 2)), dead), NOW).requeue_after

    assert [wait(n, 30) for n in (0, 1, 2, 3, 10)] == [None, 10.0, 20.0, 40.0, 300.0]
    assert wait(10, 3600) is None


def test_counters_are_the_same_whether_or_not_status_was_written_before_a_crash() -> None:
    restarts = Restarts(infrastructure=2)
    attempts = (
        an_attempt(2, a_dead_pod(0, 72, failed("RankKilled")), failed=True),
        an_attempt(3, a_pod(), restarts=restarts),
    )
    behind = decide(an_observation(a_job(_status("Running", 2, restarts=Restarts(infrastructure=1))), *attempts), NOW)
    ahead = decide(an_observation(a_job(_status("Restarting", 3, restarts=restarts)), *attempts), NOW)
    for decision in (behind, ahead):
        assert decision.actions == ()
        assert (_desired(decision).attempt, _desired(decision).restarts) == (3, restarts)
    failure = _desired(behind).failure
    assert failure is not None
    assert failure.reason == "RankKilled"


def test_only_two_attempts_are_kept() -> None:
    dead = [
        an_attempt(n, a_dead_pod(0, 143, Result(outcome="preempted")), failed=True, finished_at=BEFORE) for n in (1, 2)
    ]
    decision = decide(an_observation(a_job(_status("Running", 2)), *dead), NOW + timedelta(hours=1))
    assert decision.actions[0] == CreateAttempt(3, Restarts(preemption=1))
    assert _deletes(decision) == ["train-1"]


def test_no_attempt_follows_while_a_pod_without_a_job_lives() -> None:
    decision = decide(an_observation(a_job(_status("Running")), orphaned_pods=(a_pod(),)), NOW)
    assert decision.actions == ()
    assert "train-1-0" in _desired(decision).message


def test_a_job_that_somebody_deleted_is_an_infrastructure_failure() -> None:
    decision = decide(an_observation(a_job(_status("Running"))), NOW)
    assert decision.actions == (CreateAttempt(2, Restarts(infrastructure=1)),)


def test_suspending_is_reported_before_the_pods_are_deleted_and_done_when_they_are_gone() -> None:
    job = a_job(_status("Running"), **_SUSPEND)
    suspending = decide(an_observation(job, an_attempt(1, a_pod())), NOW)
    assert (_deletes(suspending), suspending.status_first, _desired(suspending).suspension) == (
        ["train-1"],
        True,
        "Suspending",
    )
    leaving = decide(an_observation(job, an_attempt(1, a_pod(), deleting=True)), NOW)
    assert (leaving.actions, _desired(leaving).suspension) == ((), "Suspending")
    gone = decide(an_observation(job), NOW)
    assert (gone.actions, _desired(gone).phase, _desired(gone).suspension) == ((), "Suspended", "Suspended")


@pytest.mark.parametrize("reason", ["Suspending", "Suspended"])
def test_a_suspended_job_resumes_without_cost_even_if_the_last_status_was_lost_in_a_crash(reason: str) -> None:
    decision = decide(an_observation(a_job(_status("Suspended", 2, reason, restarts=Restarts(application=1)))), NOW)
    assert decision.actions == (CreateAttempt(3, Restarts(application=1)),)


def test_an_attempt_that_fails_after_a_resume_is_not_a_suspension() -> None:
    attempt = an_attempt(2, a_dead_pod(0, 72, failed("RankKilled")), failed=True)
    unrecorded = decide(an_observation(a_job(_status("Suspended", 1, "Suspended")), attempt), NOW)
    assert (unrecorded.actions, unrecorded.status_first, _desired(unrecorded).attempt) == ((), True, 2)
    decision = decide(an_observation(a_job(_status("Running", 2)), attempt), NOW)
    assert decision.actions == (CreateAttempt(3, Restarts(infrastructure=1)),)


def test_success_wins_over_a_suspension_and_a_deadline() -> None:
    job = a_job(_status("Running", start_time=BEFORE), run_policy={"suspend": True, "activeDeadlineSeconds": 1})
    assert _desired(decide(an_observation(job, an_attempt(1, a_done_pod(), complete=True)), NOW)).phase == "Succeeded"


def test_a_deadline_deletes_the_pods_first_and_fails_the_job_when_they_are_gone() -> None:
    job = a_job(_status("Running", start_time=BEFORE), run_policy={"activeDeadlineSeconds": 60})
    running = decide(an_observation(job, an_attempt(1, a_pod())), NOW)
    assert (_deletes(running), _desired(running).phase) == (["train-1"], "Running")
    gone = _desired(decide(an_observation(job), NOW))
    assert (gone.phase, gone.reason) == ("Failed", "DeadlineExceeded")


def test_the_job_is_reconciled_again_at_its_deadline() -> None:
    job = a_job(_status("Running", start_time=BEFORE), run_policy={"activeDeadlineSeconds": 600})
    assert decide(an_observation(job, an_attempt(1, a_pod())), NOW).requeue_after == 600 - 245


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
@pytest.mark.parametrize(
    "children",
    [(), (an_attempt(1, a_pod()),), (an_attempt(1, a_dead_pod(0, 72), failed=True),)],
    ids=["children gone", "children running", "children failed"],
)
def test_what_has_ended_stays_ended(phase: Phase, children: Any) -> None:
    assert decide(an_observation(a_job(_status(phase)), *children), NOW) == Decision(None)


def test_pods_of_a_finished_job_are_deleted_after_their_ttl() -> None:
    def at(completed: str) -> Decision:
        job = a_job(_status("Succeeded", completion_time=completed), run_policy={"ttlSecondsAfterFinished": 300})
        return decide(an_observation(job, an_attempt(1, a_done_pod(), complete=True)), NOW)

    assert (at("2026-01-02T03:04:00Z").actions, at("2026-01-02T03:04:00Z").requeue_after) == ((), 295.0)
    assert _deletes(at("2026-01-02T02:00:00Z")) == ["train-1"]


@pytest.mark.parametrize(
    "desired_after", [lambda s, o: blocked(s, o, "quota"), lambda s, o: failed_to_start(s, o, "NameConflict", "x")]
)
def test_an_attempt_that_could_not_be_created_is_never_counted(desired_after: Any) -> None:
    observed: Observed = an_observation(
        a_job(_status("Running")), an_attempt(1, a_dead_pod(0, 72, failed("RankKilled")), failed=True)
    )
    desired = _desired(decide(observed, NOW))
    assert (desired.attempt, desired.restarts) == (2, Restarts(infrastructure=1))
    corrected = desired_after(observed, desired)
    assert (corrected.attempt, corrected.restarts) == (1, Restarts())


@pytest.mark.parametrize("phase", ["Starting", "Running", "Succeeded", "Failed", "Suspended"])
def test_an_old_attempt_that_a_crash_has_left_is_deleted_later(phase: Phase) -> None:
    done = phase in ("Succeeded", "Failed")
    attempts = (
        an_attempt(1, a_dead_pod(0, 72), failed=True),
        an_attempt(2, a_dead_pod(0, 72), failed=True, uid="child-2"),
        an_attempt(3, a_done_pod() if done else a_pod(), complete=done, uid="child-3"),
    )
    decision = decide(an_observation(a_job(_status(phase, 3)), *attempts), NOW)
    assert _deletes(decision) == ["train-1"]
