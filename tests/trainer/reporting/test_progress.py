"""Progress as it arrives at an operator: a small real HTTP server answers as the operator's
replicas do."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.messages.progress import Progress
from finetune_trainer.reporting.progress import post
from trainer.support import supervisor_process
from trainer.support.operator_replica import replica
from trainer.support.supervisor_process import JobSetup


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    (tmp_path / "token").write_text("t0ken\n")
    return JobSetup(tmp_path).write_inputs()


def test_phases_steps_and_losses_arrive_with_the_pods_token(setup: JobSetup) -> None:
    with replica() as operator:
        run = setup.with_changes(
            progress=supervisor_process.progress_config(operator.url, setup.folder / "token", 0.05)
        ).run()
        ended = supervisor_process.supervise(run, setup.folder, behavior={"seconds": 0.4})
    assert ended.code == 0, ended.output
    assert {token for token, _ in operator.taken} == {"Bearer t0ken"}
    expected = ("fetching", "training", "done")
    first = dict.fromkeys(operator.phases)  # a phase between two posts may or may not be reported
    assert [phase for phase in first if phase in expected] == list(expected)
    steps = [progress.step for _, progress in operator.taken]
    assert steps == sorted(steps)
    last = operator.taken[-1][1]
    assert (last.step, last.total_steps, last.train_loss, last.eval_loss) == (4, 4, 0.75, 0.9)
    assert (last.test_loss_before, last.test_loss_after, last.tokens, last.samples) == (4.0, 1.5, 400, 32)
    assert last.model is not None
    assert last.model.parameters == 1000
    assert any(progress.checkpoint is not None for _, progress in operator.taken)
    assert any(progress.tokens_per_second for _, progress in operator.taken)


def test_a_replica_that_is_not_the_leader_redirects_the_post_to_the_leader(setup: JobSetup) -> None:
    with replica() as follower, replica() as leader:
        follower.status, follower.location = 307, leader.url
        config = supervisor_process.progress_config(follower.url, setup.folder / "token")
        assert post(config, Progress(attempt=1, step=7)).accepted
    assert leader.taken[0][1].step == 7
    assert leader.taken[0][0] == "Bearer t0ken"


def test_two_replicas_that_redirect_to_each_other_are_given_up(setup: JobSetup) -> None:
    with replica() as one, replica() as other:
        one.status, one.location = 307, other.url
        other.status, other.location = 307, one.url
        answer = post(supervisor_process.progress_config(one.url, setup.folder / "token"), Progress(attempt=1))
    assert (answer.accepted, answer.status) == (False, 307)


def test_a_rotated_token_is_read_again(setup: JobSetup) -> None:
    with replica() as operator:
        config = supervisor_process.progress_config(operator.url, setup.folder / "token")
        post(config, Progress(attempt=1))
        (setup.folder / "token").write_text("new")
        post(config, Progress(attempt=1))
    assert [token for token, _ in operator.taken] == ["Bearer t0ken", "Bearer new"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1/progress", "nonsense"])
def test_a_missing_operator_does_not_disturb_training_and_is_logged_once(setup: JobSetup, url: str) -> None:
    run = setup.with_changes(progress=supervisor_process.progress_config(url, setup.folder / "token", 0.05)).run()
    ended = supervisor_process.supervise(run, setup.folder, behavior={"seconds": 0.3})
    assert ended.code == 0, ended.output
    assert ended.output.count("the operator didn't accept progress") == 1


def test_a_refusal_is_logged_once_per_change_and_so_is_recovery(setup: JobSetup) -> None:
    with replica() as operator:
        operator.status = 403
        hold = {"hold": str(setup.folder / "go"), "hold_at": 2, "seconds": 0.1}
        run = setup.with_changes(
            progress=supervisor_process.progress_config(operator.url, setup.folder / "token", 0.05)
        ).run()
        running = supervisor_process.start(run, setup.folder, behavior=hold)
        events = setup.folder / "scratch/events/rank-0.jsonl"
        supervisor_process.wait_until(lambda: events.exists() and '"step":2' in events.read_text())
        operator.status = 200
        (setup.folder / "go").touch()
        ended = running.wait()
    assert ended.code == 0
    assert ended.output.count("the operator didn't accept progress") == 1
    assert ended.output.count("the operator accepts progress again") == 1
