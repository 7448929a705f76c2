"""The status that is reported of a job, whether kstatus interprets it correctly, and when it is
written."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest

from finetune_api import untrusted
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
from finetune_operator.controller.event_recorder import EventRecorder, full_message, happenings
from finetune_operator.core.actions import DesiredStatus
from finetune_operator.core.decide import decide
from finetune_operator.core.objects import Observed, Report
from finetune_operator.core.status import MAX_MESSAGE_CHARACTERS, acknowledged, status, timestamp
from finetune_operator.core.write_policy import (
    MESSAGE_SETTLE_SECONDS,
    NEWS_SECONDS,
    SETTLE_SECONDS,
    seconds_until_due,
)
from finetune_operator.kube.client import ApiError, NotFound, Refused
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


def _warning(before: Status, after: Status) -> tuple[str, str] | None:
    """Return the reason and message of the warning about a change of status, if there is one."""
    warnings = [(h.reason, h.message) for h in happenings(before, after) if h.kind == "Warning"]
    return warnings[0] if warnings else None


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
    assert reported.progress.eta == ""
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
        (Status(), {"observed_generation": 1}, 0.0, SETTLE_SECONDS),
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
    just_started = {"start_time": timestamp(NOW)}
    fresh, later = first.model_copy(update=just_started), second.model_copy(update=just_started)
    assert seconds_until_due(fresh, later, 0.0, 30, NOW + timedelta(seconds=4)) == 6.0
    assert seconds_until_due(first, second, 0.0, 30, NOW + timedelta(seconds=10)) == 41.0
    assert seconds_until_due(first, second, 0.0, 30, NOW + timedelta(hours=1)) == 0.0


@pytest.mark.parametrize(
    ("change", "age", "due"),
    [
        ({"step": 1}, 1, NEWS_SECONDS - 1),
        ({"step": 1}, 5, 0.0),
        ({"phase": "training"}, 1, NEWS_SECONDS - 1),
        ({"attempt": 2}, 1, NEWS_SECONDS - 1),
        ({"message": "reading the second file"}, 1, 9.0),
    ],
    ids=["the first step", "the first step later", "another phase", "another attempt", "another file"],
)
def test_news_of_the_trainer_does_not_wait(change: dict[str, Any], age: int, due: float) -> None:
    progress = ProgressStatus(attempt=1, phase="loading", update_time=timestamp(NOW))
    before = Status(phase="Running", start_time=timestamp(NOW), progress=progress)
    after = before.model_copy(update={"progress": progress.model_copy(update=change)})
    assert seconds_until_due(before, after, 0.0, 30, NOW + timedelta(seconds=age)) == due


def test_a_running_job_says_what_the_trainer_does_and_that_is_progress() -> None:
    def doing(message: str) -> Status:
        report = _report(phase="fetching", message=message)
        return _status_of(an_observation(a_job(), an_attempt(1, a_pod()), report=report))

    first, second = doing("fetching the first file"), doing("fetching the second file")
    assert (first.message, second.message) == ("fetching the first file", "fetching the second file")
    assert [c.message for c in first.conditions if c.type == "Reconciling"] == ["1 pod of train-1 is running"]
    fresh = [each.model_copy(update={"start_time": timestamp(NOW)}) for each in (first, second)]
    assert seconds_until_due(*fresh, 0.0, 30, NOW + timedelta(seconds=4)) == 6.0


def test_evaluating_and_training_in_turn_is_no_news() -> None:
    progress = ProgressStatus(attempt=1, phase="training", step=5, update_time=timestamp(NOW))
    before = Status(phase="Running", start_time=timestamp(NOW), progress=progress)
    after = before.model_copy(update={"progress": progress.model_copy(update={"phase": "evaluating"})})
    assert seconds_until_due(before, after, 0.0, 30, NOW + timedelta(seconds=1)) == 9.0


def test_a_long_message_is_shortened_in_status_and_complete_in_the_condition() -> None:
    text = "0/3 nodes are available: " + ", ".join(f"{n} node(s) had an untolerated taint" for n in range(9))
    reported = _status_of(an_observation(a_job(), an_attempt(1, a_pod(0, "Pending", unschedulable=text))))
    assert len(reported.message) <= MAX_MESSAGE_CHARACTERS
    assert reported.message.startswith("pod train-1-0: 0/3 nodes are available: ")
    assert "…" in reported.message
    assert reported.message.endswith("untolerated taint")
    assert reported.reason == "Unschedulable"
    assert full_message(reported) == f"pod train-1-0: {text}"
    assert _warning(Status(), reported) == ("Unschedulable", f"pod train-1-0: {text}")


def test_a_restarted_job_shows_the_reason_until_it_succeeds() -> None:
    attempts = (
        an_attempt(1, a_dead_pod(0, 72, failed("RankKilled")), failed=True),
        an_attempt(2, a_pod(), restarts=Restarts(infrastructure=1)),
    )
    observed = an_observation(a_job(Status(phase="Restarting", attempt=2)), *attempts)
    running = _status_of(observed)
    assert (running.phase, running.reason) == ("Running", "RankKilled")
    done = an_attempt(2, a_done_pod(0, _SUCCESS), complete=True)
    assert _status_of(an_observation(a_job(running), attempts[0], done)).reason == ""


def test_the_life_of_a_job_is_told_in_normal_events() -> None:
    checkpoint = CheckpointStatus(step=40, uri="s3://outputs/result/checkpoints/step-40", time=BEFORE)
    starting = Status(phase="Starting", attempt=1)
    running = starting.model_copy(update={"phase": "Running", "message": "1 pod of train-1 is running"})
    first = running.model_copy(update={"progress": ProgressStatus(attempt=1, step=1, total_steps=100, train_loss=2.5)})
    stored = first.model_copy(update={"checkpoint": checkpoint})
    again = stored.model_copy(update={"attempt": 2, "restarts": Restarts(preemption=1), "message": "evicted"})
    resumed = again.model_copy(update={"progress": ProgressStatus(attempt=2, step=41, total_steps=100)})
    evaluated = resumed.model_copy(update={"evaluation": EvaluationStatus(test_loss_before=3.0, test_loss_after=1.5)})
    done = evaluated.model_copy(update={"phase": "Succeeded", "message": "training is complete"})
    life = [starting, running, first, stored, again, resumed, evaluated, done]
    events = [happening for before, after in pairwise(life) for happening in happenings(before, after)]
    assert [(event.kind, event.reason, event.message) for event in events] == [
        ("Normal", "Started", "attempt 1: 1 pod of train-1 is running"),
        ("Normal", "FirstStep", "attempt 1 trains: step 1 of 100, loss 2.5"),
        ("Normal", "CheckpointStored", "the checkpoint after step 40 is stored"),
        ("Normal", "Started", "attempt 2: evicted"),
        ("Warning", "Restarted", "evicted"),
        ("Normal", "Resumed", "attempt 2 resumed from the checkpoint after step 40; it is at step 41 of 100"),
        ("Normal", "Evaluated", "test loss 3 before, 1.5 after"),
        ("Normal", "Succeeded", "training is complete"),
    ]
    assert happenings(done, done) == ()


class _Events:
    """A client that stores Events."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, Any]] = {}
        self.refusal: ApiError | None = None

    async def create(self, resource: str, event: dict[str, Any]) -> dict[str, Any]:
        name = f"event-{len(self.stored)}"
        self.stored[name] = {**event, "metadata": {**event["metadata"], "name": name}}
        return self.stored[name]

    async def patch(self, resource: str, namespace: str, name: str, change: dict[str, Any]) -> dict[str, Any]:
        if self.refusal:
            raise self.refusal
        self.stored[name] |= change
        return self.stored[name]


@pytest.mark.parametrize("refusal", [NotFound(404, "NotFound", "gone"), Refused(403, "Forbidden", "no right")])
async def test_an_event_that_cannot_be_counted_up_is_created_again(refusal: ApiError) -> None:
    client = _Events()
    recorder = EventRecorder(client, "pod")  # type: ignore[arg-type]
    before, after = Status(phase="Running"), Status(phase="Suspended")
    await recorder.record(a_job(), before, after, NOW)
    client.refusal = refusal
    await recorder.record(a_job(), before, after, NOW)
    assert [event["count"] for event in client.stored.values()] == [1, 1]


async def test_what_happens_repeatedly_is_one_event_with_a_count() -> None:
    client = _Events()
    recorder = EventRecorder(client, "pod")  # type: ignore[arg-type]

    def at(step: int) -> Status:
        uri = f"s3://outputs/result/checkpoints/step-{step}"
        return Status(checkpoint=CheckpointStatus(step=step, uri=uri, time=BEFORE))

    for step in (10, 20, 30):
        await recorder.record(a_job(), at(step - 10), at(step), NOW)
    (event,) = client.stored.values()
    assert (event["type"], event["reason"], event["count"]) == ("Normal", "CheckpointStored", 3)
    assert event["message"] == "the checkpoint after step 30 is stored"


def test_a_change_of_a_finished_jobs_spec_is_acknowledged_and_changes_nothing_else() -> None:
    done = _status_of(CASES["done"][0])
    known = acknowledged(done, 2)
    assert known.observed_generation == 2
    assert {c.observed_generation for c in known.conditions} == {2}
    assert acknowledged(known, 1) == done


def test_there_is_a_warning_for_what_goes_wrong() -> None:
    def status_with(**fields: Any) -> Status:
        base = DesiredStatus("Running", "Running", "m", 1, Restarts())
        return status(an_observation(), replace(base, **fields), NOW)

    running = status_with()
    stuck = status_with(phase="Pending", reason="Unschedulable", message="0/3 nodes")
    assert _warning(Status(), running) is None
    assert _warning(running, stuck) == ("Unschedulable", "0/3 nodes")
    assert _warning(stuck, status_with(phase="Pending", reason="Unschedulable", message="0/4 nodes")) is None
    assert _warning(running, status_with(restarts=Restarts(preemption=1), message="again")) == (
        "Restarted",
        "again",
    )
    assert _warning(running, status_with(phase="Failed", reason="OutOfMemory", message="x")) == (
        "OutOfMemory",
        "x",
    )
    assert _warning(running, status_with(phase="Succeeded")) is None
    skipping = running.model_copy(update={"progress": ProgressStatus(step=9, skipped_steps=2)})
    event = ("StepsSkipped", "2 steps have been skipped so far; the trainer's log says why")
    assert _warning(running, skipping) == event
    assert _warning(skipping, skipping) is None
    straggler = StragglerStatus(rank=9, node=1, ratio=1.35)
    slowed = running.model_copy(update={"progress": ProgressStatus(step=9, straggler=straggler)})
    event = _warning(running, slowed)
    assert event is not None
    assert event[0] == "Straggler"
    assert "rank 9 (pod 1 of the attempt) needs 1.35 times as long" in event[1]
    slower = straggler.model_copy(update={"ratio": 1.6})
    assert _warning(slowed, running.model_copy(update={"progress": ProgressStatus(straggler=slower)})) is None
    overfit = OverfittingStatus(best_step=20, best_loss=1.5, step=40, loss=1.8)
    overfitting = running.model_copy(update={"evaluation": EvaluationStatus(overfitting=overfit)})
    event = _warning(running, overfitting)
    assert event is not None
    assert event[0] == "Overfitting"
    assert "1.5 at step 20" in event[1]
    assert _warning(overfitting, overfitting) is None


def test_the_facts_about_the_rows_are_kept_and_reported_once() -> None:
    few = DataStatus(rows=40, warnings=("FewExamples: 40 training rows",))
    checked = a_check(a_done_pod(0, Result(outcome="succeeded", data=few)), complete=True)
    reported = _status_of(an_observation(a_job(resources={"gpu": {}}), preflight=checked))
    assert reported.data == few
    assert _warning(Status(), reported) == ("DataWarning", "FewExamples: 40 training rows")
    assert _warning(reported, reported) is None
    running = replace(
        an_observation(a_job(), an_attempt(1, a_pod())), report=Report(Progress(attempt=1, data=few), timestamp(NOW))
    )
    assert _status_of(running).data == few


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a" * 40, "a" * 40),
        (
            "The scheduler says: 2 Insufficient gpus. Preemption won't help.",
            "The scheduler says: 2 Insufficient gpus. …",
        ),
        ("Short. " + "b" * 60 + " the cause", f"Short. {'b' * 26}…{'b' * 6} the cause"),
    ],
)
def test_a_line_is_cut_after_a_long_first_sentence_or_behind_its_middle(text: str, expected: str) -> None:
    short = untrusted.shortened(text, 50)
    assert len(short) <= 50
    assert short == expected
