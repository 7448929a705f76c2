"""What is said of a job, whether kstatus would read it right, and when it is worth a write."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from controller.builders import NOW, a_check, a_dead_pod, a_done_pod, a_job, a_pod, an_attempt, failed, seen
from finetune_api.progress import Progress
from finetune_api.result import Result
from finetune_api.status import (
    ArtifactStatus,
    CheckpointStatus,
    DataStatus,
    EvaluationStatus,
    OverfittingStatus,
    ProgressStatus,
    Restarts,
    Status,
)
from finetune_operator.decide import decide
from finetune_operator.decision import Outlook
from finetune_operator.observe import Observed, Report
from finetune_operator.recorder import worth_telling
from finetune_operator.status import (
    ANSWER_SECONDS,
    SETTLE_SECONDS,
    WORDS_SETTLE_SECONDS,
    acknowledged,
    seconds_until_due,
    status,
    timestamp,
    unreadable,
)


def _said(observed: Observed) -> Status:
    outlook = decide(observed, NOW).outlook
    assert outlook is not None
    return status(observed, outlook, NOW)


def _kstatus(said: Status, generation: int) -> str:
    """As cli-utils computes it for a custom resource."""
    held = {c.type for c in said.conditions if c.status == "True"}
    if said.observed_generation != generation or "Reconciling" in held:
        return "InProgress"
    return "Failed" if "Stalled" in held else "Current"


_SUCCESS = Result(
    outcome="succeeded",
    step=24,
    total_steps=24,
    artifact=ArtifactStatus(uri="s3://o", manifest_digest="sha256:1", size_bytes=1),
)

CASES: dict[str, tuple[Observed, str, str, set[str]]] = {
    "new": (seen(), "Starting", "InProgress", {"Reconciling"}),
    "being checked": (seen(a_job(resources={"gpu": {}}), preflight=a_check(a_pod())), "Pending", "InProgress",
                      {"Reconciling"}),
    "without room": (seen(a_job(), an_attempt(1, a_pod(0, "Pending", unschedulable="no room"))), "Pending",
                     "InProgress", {"Reconciling"}),
    "running": (seen(a_job(), an_attempt(1, a_pod())), "Running", "Current", set()),
    "suspended": (seen(a_job(run_policy={"suspend": True})), "Suspended", "Current", {"Suspended"}),
    "done": (seen(a_job(), an_attempt(1, a_done_pod(0, _SUCCESS), complete=True)), "Succeeded", "Current",
             {"Complete"}),
    "failed": (seen(a_job(), an_attempt(1, a_dead_pod(0, 65, failed("DatasetInvalid")), failed=True)), "Failed",
               "Failed", {"Failed", "Stalled"}),
}  # fmt: skip


@pytest.mark.parametrize(("observed", "phase", "kstatus", "held"), CASES.values(), ids=CASES.keys())
def test_phase_conditions_and_kstatus_agree(observed: Observed, phase: str, kstatus: str, held: set[str]) -> None:
    said = _said(observed)
    assert said.phase == phase
    assert {c.type for c in said.conditions if c.status == "True"} == held
    assert [c.type for c in said.conditions] == ["Complete", "Failed", "Suspended", "Reconciling", "Stalled"]
    assert all(c.reason and c.last_transition_time for c in said.conditions)
    assert _kstatus(said, 1) == kstatus


def test_the_same_observation_says_the_same_so_nothing_is_written() -> None:
    for observed in (case[0] for name, case in CASES.items() if name != "new"):
        said = _said(observed)
        again = replace(observed, job=observed.job.model_copy(update={"status": said}))
        outlook = decide(again, NOW + timedelta(seconds=30)).outlook
        if outlook is not None:
            later = status(again, outlook, NOW + timedelta(seconds=30))
            assert seconds_until_due(said, later, None, 30, NOW) is None


def test_a_conditions_time_is_that_of_its_last_change() -> None:
    first = _said(seen(a_job(), an_attempt(1, a_pod(0, "Pending"))))
    running = seen(a_job(first), an_attempt(1, a_pod()))
    outlook = decide(running, NOW).outlook
    assert outlook is not None
    later = status(running, outlook, NOW + timedelta(minutes=1))
    times = {c.type: c.last_transition_time for c in later.conditions}
    assert times["Reconciling"] == timestamp(NOW + timedelta(minutes=1))
    assert times["Complete"] == timestamp(NOW)


def _report(**fields: Any) -> Report:
    return Report(Progress(attempt=fields.pop("attempt", 1), **fields), timestamp(NOW))


def test_progress_of_an_earlier_attempt_is_history() -> None:
    observed = seen(a_job(), an_attempt(2, a_pod()), report=_report(attempt=1, step=5, total_steps=10))
    assert _said(observed).progress is None


def test_the_newest_checkpoint_is_kept_wherever_it_was_told() -> None:
    def at(step: int) -> CheckpointStatus:
        return CheckpointStatus(step=step, uri=f"s3://o/checkpoints/step-{step}", time="t")

    told = Result(outcome="preempted", checkpoint=at(9))
    observed = seen(
        a_job(Status(checkpoint=at(3))),
        an_attempt(1, a_dead_pod(0, 143, told), failed=True),
        report=_report(checkpoint=at(6)),
    )
    assert _said(observed).checkpoint == at(9)


def test_success_has_the_results_last_word() -> None:
    observed = seen(
        a_job(),
        an_attempt(1, a_done_pod(0, _SUCCESS), complete=True),
        report=_report(step=20, total_steps=24, train_loss=1.5, eta_seconds=10),
    )
    said = _said(observed)
    assert said.progress is not None
    assert (said.progress.step, said.progress.percent, said.progress.eta_seconds) == (24, 100, 0)
    assert said.progress.train_loss == 1.5
    assert said.artifact == _SUCCESS.artifact


def test_a_complete_result_has_no_checkpoints_left() -> None:
    told = CheckpointStatus(step=3, uri="s3://o/checkpoints/step-3", time="t")
    job = a_job(Status(checkpoint=told))
    assert _said(seen(job, an_attempt(1, a_pod()))).checkpoint == told
    assert _said(seen(job, an_attempt(1, a_done_pod(0, _SUCCESS), complete=True))).checkpoint is None


_BASE = Status(observed_generation=1, phase="Starting", attempt=1)
_OLD = _BASE.model_copy(update={"progress": {"step": 1, "updateTime": timestamp(NOW - timedelta(seconds=10))}})


@pytest.mark.parametrize(
    ("before", "change", "noticed", "due"),
    [
        (Status(), {"observed_generation": 1}, 0.0, ANSWER_SECONDS),
        (_BASE, {}, 0.0, None),
        (_BASE, {"phase": "Running"}, 0.0, SETTLE_SECONDS),
        (_BASE, {"message": "the same trouble in other words"}, 0.0, WORDS_SETTLE_SECONDS),
        (_BASE, {"phase": "Running"}, 5.0, 0.0),
        (_BASE, {"phase": "Succeeded"}, 0.0, 0.0),
        (_BASE, {"restarts": Restarts(application=1)}, 0.0, 0.0),
    ],
    ids=["first answer", "nothing new", "settles", "other words", "has settled", "the end", "a restart"],
)
def test_ends_are_told_at_once_and_small_changes_settle(
    before: Status, change: dict[str, Any], noticed: float, due: float | None
) -> None:
    assert seconds_until_due(before, before.model_copy(update=change), noticed, 30, NOW) == due


def test_progress_alone_is_written_at_most_every_so_often() -> None:
    observed = seen(a_job(), an_attempt(1, a_pod()), report=_report(step=1, total_steps=10))
    first = _said(observed)
    observed = replace(observed, job=a_job(first), report=Report(Progress(attempt=1, step=2, total_steps=10), "later"))
    outlook = decide(observed, NOW).outlook
    assert outlook is not None
    second = status(observed, outlook, NOW)
    assert seconds_until_due(first, second, 0.0, 30, NOW + timedelta(seconds=10)) == 20.0
    assert seconds_until_due(first, second, 0.0, 30, NOW + timedelta(seconds=31)) == 0.0


def test_a_change_of_a_finished_jobs_spec_is_acknowledged_and_changes_nothing_else() -> None:
    done = _said(CASES["done"][0])
    known = acknowledged(done, 2)
    assert known.observed_generation == 2
    assert {c.observed_generation for c in known.conditions} == {2}
    assert acknowledged(known, 1) == done


def test_a_spec_that_cannot_be_read_fails_with_the_field() -> None:
    said = unreadable(Status(), 1, "spec.method.type: is required", NOW)
    assert _kstatus(said, 1) == "Failed"
    assert said.failure is not None
    assert said.failure.reason == "InvalidSpec"
    assert "spec.method.type" in said.message


def test_events_are_for_what_goes_wrong() -> None:
    def outlook(**fields: Any) -> Status:
        base = Outlook("Running", "Running", "m", 1, Restarts())
        return status(seen(), replace(base, **fields), NOW)

    running = outlook()
    stuck = outlook(phase="Pending", reason="Unschedulable", message="0/3 nodes")
    assert worth_telling(Status(), running) is None
    assert worth_telling(running, stuck) == ("Unschedulable", "0/3 nodes")
    assert worth_telling(stuck, outlook(phase="Pending", reason="Unschedulable", message="0/4 nodes")) is None
    assert worth_telling(running, outlook(restarts=Restarts(preemption=1), message="again")) == ("Restarted", "again")
    assert worth_telling(running, outlook(phase="Failed", reason="OutOfMemory", message="x")) == ("OutOfMemory", "x")
    assert worth_telling(running, outlook(phase="Succeeded")) is None
    skipping = running.model_copy(update={"progress": ProgressStatus(step=9, skipped_steps=2)})
    told = ("StepsSkipped", "2 steps so far changed nothing; the trainer's log tells why")
    assert worth_telling(running, skipping) == told
    assert worth_telling(skipping, skipping) is None
    found = OverfittingStatus(best_step=20, best_loss=1.5, step=40, loss=1.8)
    overfitting = running.model_copy(update={"evaluation": EvaluationStatus(overfitting=found)})
    told = worth_telling(running, overfitting)
    assert told is not None
    assert told[0] == "Overfitting"
    assert "1.5 at step 20" in told[1]
    assert worth_telling(overfitting, overfitting) is None


def test_what_the_rows_turned_out_to_be_is_kept_and_told_once() -> None:
    few = DataStatus(rows=40, warnings=("FewExamples: 40 training rows",))
    checked = a_check(a_done_pod(0, Result(outcome="succeeded", data=few)), complete=True)
    said = _said(seen(a_job(resources={"gpu": {}}), preflight=checked))
    assert said.data == few
    assert worth_telling(Status(), said) == ("DataWarning", "FewExamples: 40 training rows")
    assert worth_telling(said, said) is None
    running = replace(seen(a_job(), an_attempt(1, a_pod())), report=Report(Progress(attempt=1, data=few), "t"))
    assert _said(running).data == few
