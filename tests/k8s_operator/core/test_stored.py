"""What the pods report of the output: whether it accepts checkpoints, by which keys they sign, and
a result that counts whatever happened to them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api import recipe
from finetune_api.messages.progress import Progress, Storing
from finetune_api.messages.result import Result
from finetune_api.status import MAX_SIGNERS, ArtifactStatus, CheckpointStatus, Condition, Status
from finetune_operator.controller.event_recorder import Happening, happenings
from finetune_operator.core import output, status, write_policy
from finetune_operator.core.decide import CreateAttempt, decide
from finetune_operator.core.objects import Attempt, Observed, Report
from finetune_operator.core.plan import plan
from finetune_operator.settings import ProgressSettings, Settings
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

URI = a_job().spec.output.uri
WHOLE = ArtifactStatus(uri=URI, manifest_digest="sha256:1", size_bytes=1)
ELSEWHERE = ArtifactStatus(uri="s3://elsewhere/v1", manifest_digest="sha256:1", size_bytes=1)
REFUSED = Storing(
    reason="AccessDenied", message="the store refused the credentials (AccessDenied: no)", since=BEFORE, failures=3,
    steps_at_risk=40,
)  # fmt: skip


def reported(attempt: int = 1, **fields: Any) -> Report:
    return Report(Progress(attempt=attempt, **fields), BEFORE)


def written(observed: Observed, later: float = 0) -> Status:
    decision = decide(observed, NOW)
    assert decision.desired is not None
    return status.status(observed, decision.desired, NOW + timedelta(seconds=later))


def stored(reported_status: Status) -> Condition | None:
    return next((c for c in reported_status.conditions if c.type == "CheckpointsStored"), None)


def running(report: Report | None, before: Status | None = None) -> Observed:
    return an_observation(a_job(before), an_attempt(1, a_pod()), report=report)


def test_a_refused_checkpoint_is_a_condition_with_the_words_of_the_store_and_an_event() -> None:
    unknown = written(running(reported()))
    assert stored(unknown) is None
    good = written(running(reported(storing=Storing()), unknown))
    assert stored(good) == Condition(
        type="CheckpointsStored", status="True", observed_generation=1, last_transition_time="2026-01-02T03:04:05Z",
        reason="Stored",
    )  # fmt: skip
    bad = written(running(reported(storing=REFUSED), good), later=60)
    condition = stored(bad)
    assert condition is not None
    assert (condition.status, condition.reason) == ("False", "AccessDenied")
    assert condition.last_transition_time == "2026-01-02T03:05:05Z"
    for part in (REFUSED.message, "3 uploads have failed since 2026-01-02T03:00:00Z", "40 steps would be lost"):
        assert part in condition.message
    assert happenings(good, bad) == (
        Happening("Warning", "CheckpointsNotStored", f"AccessDenied: {condition.message}"),
    )
    assert happenings(bad, bad) == ()
    # Nothing is forgotten while a pod doesn't report, and success ends it.
    assert stored(written(running(None, bad), later=90)) == condition
    ended = an_observation(a_job(bad), an_attempt(1, a_done_pod(), complete=True), report=reported(storing=REFUSED))
    success = stored(written(ended, later=99))
    assert success is not None
    assert (success.status, success.reason) == ("True", "Stored")


def test_a_change_of_what_is_stored_is_written_soon_and_a_new_figure_is_not() -> None:
    good = written(running(reported(storing=Storing())))
    bad = written(running(reported(storing=REFUSED), good))
    assert write_policy.seconds_until_due(good, bad, 0.0, 30.0, NOW) == write_policy.SETTLE_SECONDS
    worse = REFUSED.model_copy(update={"failures": 9})
    again = written(running(reported(storing=worse), bad))
    assert write_policy.seconds_until_due(bad, again, 0.0, 30.0, NOW) == write_policy.MESSAGE_SETTLE_SECONDS


def test_a_new_key_is_written_with_the_first_progress_or_soon_after() -> None:
    start = written(running(None))
    first = written(running(reported(signer="first"), start))
    assert write_policy.seconds_until_due(start, first, 0.0, 30.0, NOW) == 0.0
    progress = first.progress
    assert progress is not None
    just_now = first.model_copy(
        update={"progress": progress.model_copy(update={"update_time": "2026-01-02T03:04:05Z"})}
    )
    second = written(running(reported(signer="second"), just_now))
    assert second.signers == ("first", "second")
    assert write_policy.seconds_until_due(just_now, second, 0.0, 30.0, NOW) == write_policy.NEWS_SECONDS
    assert write_policy.seconds_until_due(just_now, second, 9.0, 30.0, NOW + timedelta(seconds=9)) == 0.0


def of(outcome: str, artifact: ArtifactStatus | None) -> Result:
    return Result(outcome=outcome, artifact=artifact)  # type: ignore[arg-type]


LOST = an_attempt(1, a_dead_pod(0, 137), failed=True)
# what was observed → whether the job has succeeded
ENDS: dict[str, tuple[tuple[Attempt, ...], Report | None, bool]] = {
    "the pod was killed after it had reported its result": ((LOST,), reported(artifact=WHOLE), True),
    "the pod was killed before": ((LOST,), reported(), False),
    "the result that it reported lies elsewhere": ((LOST,), reported(artifact=ELSEWHERE), False),
    "the result is an earlier attempt's report": (
        (LOST, an_attempt(2, a_dead_pod(0, 137), failed=True)), reported(attempt=1, artifact=WHOLE), False,
    ),
    "the Job is gone": ((), reported(artifact=WHOLE), True),
    "another pod failed after node 0 had succeeded": (
        (an_attempt(1, a_done_pod(0, of("succeeded", WHOLE)), a_dead_pod(1, 74, failed("StorageUnavailable")),
                    failed=True),), None, True,
    ),
    "another pod is still running": (
        (an_attempt(1, a_done_pod(0, of("succeeded", WHOLE)), a_pod(1)),), None, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("attempts", "report", "succeeded"), ENDS.values(), ids=ENDS)
def test_a_result_that_is_whole_counts_whatever_happened_to_its_pods(
    attempts: tuple[Attempt, ...], report: Report | None, succeeded: bool
) -> None:
    job = a_job(Status(phase="Running", attempt=max(1, len(attempts))), run_policy={"maxRestarts": {"application": 0}})
    observed = an_observation(job, *attempts, report=report)
    after = written(observed)
    assert (after.phase == "Succeeded") is succeeded
    if succeeded:
        assert after.artifact == WHOLE
        assert after.failure is None


def test_a_result_in_status_counts_after_a_restart_of_the_operator() -> None:
    before = written(running(reported(artifact=WHOLE)))
    assert before.artifact == WHOLE
    assert written(an_observation(a_job(before), LOST)).phase == "Succeeded"


def test_the_keys_of_all_pods_are_kept_and_handed_to_the_next_attempt() -> None:
    ended = a_dead_pod(0, 143, Result(outcome="preempted", reason="Preempted", signer="second"))
    job = a_job(Status(phase="Running", attempt=1, signers=("first",)))
    observed = an_observation(job, an_attempt(1, ended, failed=True), report=reported(signer="third"))
    assert output.signers(observed) == ("first", "second", "third")
    assert written(observed).signers == ("first", "second", "third")
    with_operator = Settings(trainer_image="trainer", progress=ProgressSettings(url="http://operator:8443"))
    run = output.with_origin(plan(job, with_operator, attempt=2), observed)
    assert run.signers == ("first", "second", "third")
    assert run.inherits
    assert run.recipe == recipe.digests(job.spec)
    checkpoint = CheckpointStatus(step=2, uri=f"{URI}/checkpoints/step-2", time=BEFORE)
    later = replace(observed, job=a_job(Status(phase="Running", attempt=1, checkpoint=checkpoint)))
    assert not output.with_origin(plan(later.job, with_operator, attempt=2), later).inherits
    alone = replace(observed, job=a_job())
    assert output.with_origin(plan(alone.job, Settings(trainer_image="trainer")), alone).signers is None


def test_the_newest_keys_are_kept() -> None:
    job = a_job(Status(signers=tuple(str(n) for n in range(MAX_SIGNERS))))
    observed = an_observation(job, an_attempt(1, a_pod()), report=reported(signer="newest"))
    assert output.signers(observed) == (*(str(n) for n in range(1, MAX_SIGNERS)), "newest")


def test_the_key_of_a_preflight_is_kept_for_its_tokens_only() -> None:
    passed = Result(outcome="succeeded", signer="of the preflight")
    check = a_check(a_done_pod(0, passed), complete=True)
    observed = an_observation(a_job(), preflight=check)
    assert (output.token_signers(observed), output.signers(observed)) == (("of the preflight",), ())
    assert written(observed).token_signers == ("of the preflight",)
    without_pods = an_observation(a_job(Status(token_signers=("of the preflight",))))
    for case in (observed, without_pods):
        run = output.with_origin(plan(case.job, Settings(trainer_image="trainer")), case)
        assert run.token_signers == ("of the preflight",)


def test_a_recreated_job_waits_for_the_pods_of_its_predecessor() -> None:
    dying = a_pod(owner_uid="former-uid", name="train-1-0-abcde", deleting=True)
    decision = decide(an_observation(orphaned_pods=(dying,)), NOW)
    assert decision.actions == ()
    assert decision.desired is not None
    assert decision.desired.message == (
        "waiting for pods of a deleted FineTuneJob of the same name to stop: train-1-0-abcde"
    )
    assert isinstance(decide(an_observation(), NOW).actions[0], CreateAttempt)


RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ()),
    "hardware": ({"resources": {"memory": "9Gi"}}, ()),
    "more pods": ({"distribution": {"nodes": 2}}, ()),
    "checkpoints and the output": ({"checkpoint": {"keep": 5}}, ()),
    "micro-batches": ({"training": {"microBatchSize": 1}}, ()),
    "the learning rate": ({"training": {"learningRate": 0.5}}, ("training",)),
}


@pytest.mark.parametrize(("change", "differing"), RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_what_decides_the_weights(change: dict[str, Any], differing: tuple[str, ...]) -> None:
    first, second = a_job(), a_job(**change)
    assert recipe.differing(recipe.digests(first.spec), recipe.digests(second.spec)) == differing


def test_who_may_read_the_model_is_no_part_of_a_recipe() -> None:
    spec = a_job().spec
    model = spec.model.model_copy(update={"credentials_ref": None, "allowed_licenses": ("mit",)})
    other = spec.model_copy(update={"model": model})
    assert recipe.digests(spec) == recipe.digests(other)
    other = spec.model_copy(update={"model": model.model_copy(update={"uri": "s3://other/model"})})
    assert recipe.differing(recipe.digests(spec), recipe.digests(other)) == ("model",)
