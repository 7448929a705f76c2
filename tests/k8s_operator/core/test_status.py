"""The status that is reported of a job, whether kstatus interprets it correctly, and when it is
written."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.messages.progress import Progress
from finetune_api.messages.result import Result
from finetune_api.status import (
    ArtifactStatus,
    CheckpointStatus,
    DataStatus,
    EvaluationStatus,
    OverfittingStatus,
    ProgressStatus,
    Restarts,
    Status,
    StragglerStatus,
)
from finetune_operator.controller.event_recorder import event_of_change
from finetune_operator.core.actions import DesiredStatus
from finetune_operator.core.decide import decide
from finetune_operator.core.objects import Observed, Report
from finetune_operator.core.status import (
    ACKNOWLEDGE_SECONDS,
    MESSAGE_SETTLE_SECONDS,
    SETTLE_SECONDS,
    acknowledged,
    seconds_until_due,
    status,
    timestamp,
)
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


def _status_of(observed: Observed) -> Status:
    desired = decide(observed, NOW).desired
    assert desired is not None
    return status(observed, desired, NOW)


def _kstatus(reported: Status, generation: int) -> str:
    """Return the status that cli-utils computes for a custom resource."""
    true_conditions = {c.type for c in reported.conditions if c.status == "True"}
    if reported.observed_generation != generation or "Reconciling" in true_conditions:
        return "InProgress"
    return "Failed" if "Stalled" in true_conditions else "Current"


_SUCCESS = Result(
    outcome="succeeded",
    step=24,
    total_steps=24,
    artifact=ArtifactStatus(uri="s3://outputs/result", manifest_digest="sha256:1", size_bytes=1),
)

CASES: dict[str, tuple[Observed, str, str, set[str]]] = {
    "new": (an_observation(), "Starting", "InProgress", {"Reconciling"}),
    "being checked": (an_observation(a_job(resources={"gpu": {}}), preflight=a_check(a_pod())), "Pending", "InProgress",
                      {"Reconciling"}),
    "without room": (an_observation(a_job(), an_attempt(1, a_pod(0, "Pending", unschedulable="no room"))), "Pending",
                     "InProgress", {"Reconciling"}),
    "running": (an_observation(a_job(), an_attempt(1, a_pod())), "Running", "Current", set()),
    "suspended": (an_observation(a_job(run_policy={"suspend": True})), "Suspended", "Current", {"Suspended"}),
    "done": (an_observation(a_job(), an_attempt(1, a_done_pod(0, _SUCCESS), complete=True)), "Succeeded", "Current",
             {"Complete"}),
    "failed": (an_observation(a_job(), an_attempt(1, a_dead_pod(0, 65, failed("DatasetInvalid")), failed=True)),
               "Failed", "Failed", {"Failed", "Stalled"}),
}  # fmt: skip


@pytest.mark.parametrize(("observed", "phase", "kstatus", "true_conditions"), CASES.values(), ids=CASES.keys())
def test_phase_conditions_and_kstatus_agree(
    observed: Observed, phase: str, kstatus: str, true_conditions: set[str]
) -> None:
    reported = _status_of(observed)
    assert reported.phase == phase
    assert {c.type for c in reported.conditions if c.status == "True"} == true_conditions
    assert [c.type for c in reported.conditions] == ["Complete", "Failed", "Suspended", "Reconciling", "Stalled"]
    assert all(c.reason and c.last_transition_time for c in reported.conditions)
    assert _kstatus(reported, 1) == kstatus


def test_the_same_observation_gives_the_same_status_so_nothing_is_written() -> None:
    for observed in (case[0] for name, case in CASES.items() if name != "new"):
        reported = _status_of(observed)
        again = replace(observed, job=observed.job.model_copy(update={"status": reported}))
        desired = decide(again, NOW + timedelta(seconds=30)).desired
        if desired is not None:
            later = status(again, desired, NOW + timedelta(seconds=30))
            assert seconds_until_due(reported, later, None, 30, NOW) is None


def test_a_conditions_time_is_that_of_its_last_change() -> None:
    first = _status_of(an_observation(a_job(), an_attempt(1, a_pod(0, "Pending"))))
    running = an_observation(a_job(first), an_attempt(1, a_pod()))
    desired = decide(running, NOW).desired
    assert desired is not None
    later = status(running, desired, NOW + timedelta(minutes=1))
    times = {c.type: c.last_transition_time for c in later.conditions}
    assert times["Reconciling"] == timestamp(NOW + timedelta(minutes=1))
    assert times["Complete"] == timestamp(NOW)


def _report(**fields: Any) -> Report:
    return Report(Progress(attempt=fields.pop("attempt", 1), **fields), timestamp(NOW))


def test_progress_of_an_earlier_attempt_is_not_reported() -> None:
    observed = an_observation(a_job(), an_attempt(2, a_pod()), report=_report(attempt=1, step=5, total_steps=10))
    assert _status_of(observed).progress is None


def test_the_newest_checkpoint_is_kept_from_any_source() -> None:
    def at(step: int) -> CheckpointStatus:
        return CheckpointStatus(step=step, uri=f"s3://outputs/result/checkpoints/step-{step}", time=BEFORE)

    result = Result(outcome="preempted", checkpoint=at(9))
    observed = an_observation(
        a_job(Status(checkpoint=at(3))),
        an_attempt(1, a_dead_pod(0, 143, result), failed=True),
        report=_report(checkpoint=at(6)),
    )
    assert _status_of(observed).checkpoint == at(9)


def test_success_shows_the_figures_of_the_result() -> None:
    observed = an_observation(
        a_job(),
        an_attempt(1, a_done_pod(0, _SUCCESS), complete=True),
        report=_report(step=20, total_steps=24, train_loss=1.5, eta_seconds=10),
    )
    reported = _status_of(observed)
    assert reported.progress is not None
    assert (reported.progress.step, reported.progress.percent, reported.progress.eta_seconds) == (24, 100, 0)
    assert reported.progress.train_loss == 1.5
    assert reported.artifact == _SUCCESS.artifact


def test_a_complete_result_has_no_checkpoints_left() -> None:
    checkpoint = CheckpointStatus(step=3, uri="s3://outputs/result/checkpoints/step-3", time=BEFORE)
    job = a_job(Status(checkpoint=checkpoint))
    assert _status_of(an_observation(job, an_attempt(1, a_pod()))).checkpoint == checkpoint
    assert _status_of(an_observation(job, an_attempt(1, a_done_pod(0, _SUCCESS), complete=True))).checkpoint is None


_BASE = Status(observed_generation=1, phase="Starting", attempt=1)
_OLD = _BASE.model_copy(update={"progress": {"step": 1, "updateTime": timestamp(NOW - timedelta(seconds=10))}})


@pytest.mark.parametrize(
    ("before", "change", "noticed", "due"),
    [
        (Status(), {"observed_generation": 1}, 0.0, ACKNOWLEDGE_SECONDS),
        (_BASE, {}, 0.0, None),
        (_BASE, {"phase": "Running"}, 0.0, SETTLE_SECONDS),
        (_BASE, {"message": "the same problem with another message"}, 0.0, MESSAGE_SETTLE_SECONDS),
        (_BASE, {"phase": "Running"}, 5.0, 0.0),
        (_BASE, {"phase": "Succeeded"}, 0.0, 0.0),
        (_BASE, {"restarts": Restarts(application=1)}, 0.0, 0.0),
    ],
    ids=["first answer", "nothing new", "settles", "another message", "has settled", "the end", "a restart"],
)
def test_ends_are_reported_immediately_and_small_changes_settle(
    before: Status, change: dict[str, Any], noticed: float, due: float | None
) -> None:
    assert seconds_until_due(before, before.model_copy(update=change), noticed, 30, NOW) == due


def test_progress_alone_is_written_at_most_once_per_interval() -> None:
    observed = an_observation(a_job(), an_attempt(1, a_pod()), report=_report(step=1, total_steps=10))
    first = _status_of(observed)
    observed = replace(
        observed,
        job=a_job(first),
        report=Report(Progress(attempt=1, step=2, total_steps=10), timestamp(NOW + timedelta(seconds=1))),
    )
    desired = decide(observed, NOW).desired
    assert desired is not None
    second = status(observed, desired, NOW)
    assert seconds_until_due(first, second, 0.0, 30, NOW + timedelta(seconds=10)) == 20.0
    assert seconds_until_due(first, second, 0.0, 30, NOW + timedelta(seconds=31)) == 0.0


def test_a_change_of_a_finished_jobs_spec_is_acknowledged_and_changes_nothing_else() -> None:
    done = _status_of(CASES["done"][0])
    known = acknowledged(done, 2)
    assert known.observed_generation == 2
    assert {c.observed_generation for c in known.conditions} == {2}
    assert acknowledged(known, 1) == done


def test_events_are_written_only_for_what_goes_wrong() -> None:
    def status_with(**fields: Any) -> Status:
        base = DesiredStatus("Running", "Running", "m", 1, Restarts())
        return status(an_observation(), replace(base, **fields), NOW)

    running = status_with()
    stuck = status_with(phase="Pending", reason="Unschedulable", message="0/3 nodes")
    assert event_of_change(Status(), running) is None
    assert event_of_change(running, stuck) == ("Unschedulable", "0/3 nodes")
    assert event_of_change(stuck, status_with(phase="Pending", reason="Unschedulable", message="0/4 nodes")) is None
    assert event_of_change(running, status_with(restarts=Restarts(preemption=1), message="again")) == (
        "Restarted",
        "again",
    )
    assert event_of_change(running, status_with(phase="Failed", reason="OutOfMemory", message="x")) == (
        "OutOfMemory",
        "x",
    )
    assert event_of_change(running, status_with(phase="Succeeded")) is None
    skipping = running.model_copy(update={"progress": ProgressStatus(step=9, skipped_steps=2)})
    event = ("StepsSkipped", "2 steps have been skipped so far; the trainer's log says why")
    assert event_of_change(running, skipping) == event
    assert event_of_change(skipping, skipping) is None
    straggler = StragglerStatus(rank=9, node=1, ratio=1.35)
    slowed = running.model_copy(update={"progress": ProgressStatus(step=9, straggler=straggler)})
    event = event_of_change(running, slowed)
    assert event is not None
    assert event[0] == "Straggler"
    assert "rank 9 (pod 1 of the attempt) needs 1.35 times as long" in event[1]
    slower = straggler.model_copy(update={"ratio": 1.6})
    assert event_of_change(slowed, running.model_copy(update={"progress": ProgressStatus(straggler=slower)})) is None
    overfit = OverfittingStatus(best_step=20, best_loss=1.5, step=40, loss=1.8)
    overfitting = running.model_copy(update={"evaluation": EvaluationStatus(overfitting=overfit)})
    event = event_of_change(running, overfitting)
    assert event is not None
    assert event[0] == "Overfitting"
    assert "1.5 at step 20" in event[1]
    assert event_of_change(overfitting, overfitting) is None


def test_the_facts_about_the_rows_are_kept_and_reported_once() -> None:
    few = DataStatus(rows=40, warnings=("FewExamples: 40 training rows",))
    checked = a_check(a_done_pod(0, Result(outcome="succeeded", data=few)), complete=True)
    reported = _status_of(an_observation(a_job(resources={"gpu": {}}), preflight=checked))
    assert reported.data == few
    assert event_of_change(Status(), reported) == ("DataWarning", "FewExamples: 40 training rows")
    assert event_of_change(reported, reported) is None
    running = replace(
        an_observation(a_job(), an_attempt(1, a_pod())), report=Report(Progress(attempt=1, data=few), timestamp(NOW))
    )
    assert _status_of(running).data == few
