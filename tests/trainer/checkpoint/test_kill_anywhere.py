"""A run that is killed after every step of two epochs and resumed each time gives the same result
as an uninterrupted run, in every way of training.

A SIGKILL is sent at an exact point (`forked_ranks.KillPoint`): after a step was trained and
reported, and before its checkpoint is written.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages import events
from finetune_trainer.checkpoint import local_folder
from finetune_trainer.data.batching import batch_plan
from testkit.rows import pairs
from trainer.support import reference_implementation
from trainer.support.checkpoints import newest_complete
from trainer.support.forked_ranks import KillPoint
from trainer.support.rank_runs import FinishedRun, Job, finish_all, in_parallel, prepare

_STEPS = 5
_BEGINNING = "move the tower light ship again and aim about: "
_WAYS: dict[str, dict[str, Any]] = {
    "ddp, 1 rank": {},
    "ddp, 2 ranks": {"world": 2},
    "by length, padded": {"training": {"group_by_length": True, "scheduler": "wsd"}, "data": {"packing": False}},
    "zero1": {"world": 2, "strategy": "zero1"},
    "zero2": {"world": 2, "strategy": "zero2", "shards": "always"},
    "zero3": {"world": 2, "strategy": "zero3", "shards": "always"},
    "fsdp": {"world": 2, "strategy": "fsdp", "shards": "always"},
    "full, 1 rank": {"full": True},
    "full, fsdp": {"world": 2, "strategy": "fsdp", "full": True},
    "shared beginnings": {"beginning": _BEGINNING, "training": {"micro_batch_size": 4}},
}


def _job(folder: Path, model: Path, way: dict[str, Any], resume: Path | None = None) -> Job:
    """A job of 9 rows with a global batch of 4: the second epoch begins within a step, and the last
    step is a small one."""
    training = {
        "max_steps": None,
        "epochs": 2.0,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        **way.get("training", {}),
    }
    options = {key: value for key, value in way.items() if key not in ("training", "beginning")}
    rows = [{**row, "prompt": way.get("beginning", "") + row["prompt"]} for row in pairs(9)]
    return prepare(folder, model, rows, lora={"dropout": 0.1}, training=training, every=1, resume=resume, **options)


@dataclass(frozen=True)
class Killed:
    """An uninterrupted run and the last attempt of the killed one. `steps` are those of all
    attempts; `points` are the checkpoints that the attempts resumed from, by step."""

    uninterrupted: FinishedRun
    last: FinishedRun
    steps: list[events.StepEvent]
    points: dict[int, Path]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Killed]:
    root, llama = tmp_path_factory.mktemp("killed"), models["llama"]
    tasks = [partial(_kill_at_every_step, root / str(index), llama, way) for index, way in enumerate(_WAYS.values())]
    return dict(zip(_WAYS, in_parallel(tasks), strict=True))


def _kill_at_every_step(here: Path, model: Path, way: dict[str, Any]) -> Killed:
    points: dict[int, Path] = {}
    steps: list[events.StepEvent] = []
    uninterrupted = _job(here / "uninterrupted", model, way).finish().check()
    for step in range(1, _STEPS):
        job = _job(here / f"at-{step}", model, way, points.get(step - 1))
        ended = job.start(kill_point=KillPoint(f"/step-{step + 1}")).wait_for_crash()
        assert ended.codes[0] == -9, ended.logs
        assert set(ended.codes[1:]) <= {-9, 75}, ended.logs  # killed, or ended because its peer was lost
        steps += [event for event in ended.events(events.StepEvent) if event.step == step]
        assert ended.events(events.StepEvent)[-1].step == step + 1
        newest = newest_complete(job.paths.checkpoints)
        assert newest == job.paths.checkpoints / f"step-{step}"
        points[step] = newest
    last = _job(here / "last", model, way, points[_STEPS - 1]).finish().check()
    return Killed(uninterrupted, last, [*steps, *last.events(events.StepEvent)], points)


@pytest.mark.parametrize("way", _WAYS)
def test_killed_at_every_step_a_run_ends_with_the_same_adapter(way: str, killed: dict[str, Killed]) -> None:
    """Bugs 13 and 27: random state that is restored too late, or an adapter that is initialized
    again."""
    uninterrupted, last = killed[way].uninterrupted.paths.export, killed[way].last.paths.export
    names = sorted(path.name for path in uninterrupted.iterdir())
    assert {"adapter_model.safetensors", "model.safetensors"} & set(names)
    assert names == sorted(path.name for path in last.iterdir())
    for name in names:
        assert (uninterrupted / name).read_bytes() == (last / name).read_bytes(), name


@pytest.mark.parametrize("way", _WAYS)
def test_killed_at_every_step_a_run_reports_the_same_history(way: str, killed: dict[str, Killed]) -> None:
    """Bugs 11 and 12: a resumed run repeats an epoch, skips in another permutation, or groups by
    length again."""

    def numbers(steps: list[events.StepEvent]) -> list[dict[str, Any]]:
        return [step.model_dump(exclude={"time", "seconds", "ranks"}) for step in steps]

    assert len(killed[way].steps) == _STEPS
    assert numbers(killed[way].steps) == numbers(killed[way].uninterrupted.events(events.StepEvent))


def test_prefixes_that_rows_have_in_common_are_computed_once(killed: dict[str, Killed]) -> None:
    for ended in (killed["shared beginnings"].uninterrupted, killed["shared beginnings"].last):
        assert ended.decision("sharedPrefix").choice == "on"
        assert ended.events(events.PlanEvent)[0].computed_share < 0.8


@pytest.mark.parametrize("way", _WAYS)
def test_every_step_trained_on_the_rows_of_the_plan(
    way: str, killed: dict[str, Killed], models: dict[str, Path], tmp_path: Path
) -> None:
    job = _job(tmp_path / "job", models["llama"], _WAYS[way])
    rows = reference_implementation.examples(job, tmp_path / "tokens")
    expected = reference_implementation.batch_plan_of(job, rows)
    for event in killed[way].steps:
        step: batch_plan.Step = expected.step(event.step)
        assert (event.tokens, event.label_tokens, event.samples) == (step.tokens, step.label_tokens, len(step.examples))


def test_each_checkpoint_resumes_to_the_same_end(
    killed: dict[str, Killed], models: dict[str, Path], tmp_path: Path
) -> None:
    """Each checkpoint is resumed once and trained to the end without another kill."""
    one = killed["ddp, 1 rank"]
    jobs = [_job(tmp_path / str(step), models["llama"], {}, point) for step, point in one.points.items()]
    for step, ended in zip(one.points, finish_all(jobs), strict=True):
        assert ended.losses == one.uninterrupted.losses[step:]
        for name in ("adapter_model.safetensors", "README.md"):
            assert (ended.paths.export / name).read_bytes() == (one.uninterrupted.paths.export / name).read_bytes()


def test_killed_at_any_access_to_a_checkpoint_the_newest_complete_one_is_found(
    killed: dict[str, Killed], models: dict[str, Path], tmp_path: Path
) -> None:
    """Bug 14: a checkpoint is half written when the machine fails.

    The run is killed at each access of rank 0 to the files of checkpoint 3, until there is no
    access left.
    """
    start = killed["ddp, 1 rank"].points[1]
    newest_steps = []
    for nth in range(1, 100):
        job = _job(tmp_path / str(nth), models["llama"], {}, start)
        ended = job.start(kill_point=KillPoint("/step-3", nth)).wait_for_crash()
        if ended.codes == (0,):
            break
        assert ended.codes == (-9,), ended.logs
        newest = newest_complete(job.paths.checkpoints)
        assert newest is not None
        assert local_folder.read_state(newest) is not None
        newest_steps.append(int(newest.name[5:]))
        shutil.rmtree(job.scratch)
    assert len(newest_steps) > 5
    assert newest_steps == sorted(newest_steps)
    assert newest_steps[0] == 2
    assert newest_steps[-1] > 3  # checkpoint 3 is removed when newer ones are complete
