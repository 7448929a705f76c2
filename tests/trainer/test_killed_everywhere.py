"""Killed at every step of two epochs and gone on with, in every way of training: the result of the run that wasn't.

The kills are SIGKILLs at an exact place (`forked.Die`): after a step was learnt and told, before its checkpoint is.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune_api import events
from finetune_trainer import checkpoint, manifest_io, plan
from trainer import naive
from trainer.forked import Die
from trainer.ranks import Ended, Job, at_once, finish_all, pairs, prepare

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
    """9 rows by 4 a step: the second epoch begins within a step, and the last step is a small one."""
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
    """`steps` are those of all attempts; `points` the checkpoints that they went on from, by step."""

    whole: Ended
    last: Ended
    steps: list[events.StepEvent]
    points: dict[int, Path]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Killed]:
    root, llama = tmp_path_factory.mktemp("killed"), models["llama"]
    tasks = [partial(_kill_at_every_step, root / str(index), llama, way) for index, way in enumerate(_WAYS.values())]
    return dict(zip(_WAYS, at_once(tasks), strict=True))


def _kill_at_every_step(here: Path, model: Path, way: dict[str, Any]) -> Killed:
    points: dict[int, Path] = {}
    steps: list[events.StepEvent] = []
    whole = _job(here / "whole", model, way).finish().check()
    for step in range(1, _STEPS):
        job = _job(here / f"at-{step}", model, way, points.get(step - 1))
        ended = job.start(die=Die(f"/step-{step + 1}")).died()
        assert ended.codes[0] == -9, ended.logs
        assert set(ended.codes[1:]) <= {-9, 75}, ended.logs  # killed, or quicker in saying that its peer is lost
        steps += [event for event in ended.events(events.StepEvent) if event.step == step]
        assert ended.events(events.StepEvent)[-1].step == step + 1
        newest = manifest_io.newest_complete(job.paths.checkpoints)
        assert newest == job.paths.checkpoints / f"step-{step}"
        points[step] = newest
    last = _job(here / "last", model, way, points[_STEPS - 1]).finish().check()
    return Killed(whole, last, [*steps, *last.events(events.StepEvent)], points)


@pytest.mark.parametrize("way", _WAYS)
def test_killed_at_every_step_a_run_ends_with_the_same_adapter(way: str, killed: dict[str, Killed]) -> None:
    """Bugs 13 and 27: random state that is put back too late, or an adapter that is initialised again."""
    whole, last = killed[way].whole.paths.export, killed[way].last.paths.export
    names = sorted(path.name for path in whole.iterdir())
    assert {"adapter_model.safetensors", "model.safetensors"} & set(names)
    assert names == sorted(path.name for path in last.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (last / name).read_bytes(), name


@pytest.mark.parametrize("way", _WAYS)
def test_killed_at_every_step_a_run_tells_the_same_history(way: str, killed: dict[str, Killed]) -> None:
    """Bugs 11 and 12: a resumed run replays an epoch, or skips another permutation, or groups by length anew."""

    def told(steps: list[events.StepEvent]) -> list[dict[str, Any]]:
        return [step.model_dump(exclude={"time", "seconds"}) for step in steps]

    assert len(killed[way].steps) == _STEPS
    assert told(killed[way].steps) == told(killed[way].whole.events(events.StepEvent))


def test_beginnings_that_rows_have_in_common_were_computed_once(killed: dict[str, Killed]) -> None:
    for ended in (killed["shared beginnings"].whole, killed["shared beginnings"].last):
        assert ended.decision("sharedPrefix").choice == "on"
        assert ended.events(events.PlanEvent)[0].computed_share < 0.8


@pytest.mark.parametrize("way", _WAYS)
def test_every_step_learnt_the_rows_of_the_plan(
    way: str, killed: dict[str, Killed], models: dict[str, Path], tmp_path: Path
) -> None:
    job = _job(tmp_path / "job", models["llama"], _WAYS[way])
    rows = naive.examples(job, tmp_path / "tokens")
    expected = naive.schedule_of(job, rows)
    for event in killed[way].steps:
        step: plan.Step = expected.step(event.step)
        assert (event.tokens, event.label_tokens, event.samples) == (step.tokens, step.label_tokens, len(step.examples))


def test_each_checkpoint_goes_on_to_the_same_end(
    killed: dict[str, Killed], models: dict[str, Path], tmp_path: Path
) -> None:
    """From each of them to the end in one go."""
    one = killed["ddp, 1 rank"]
    jobs = [_job(tmp_path / str(step), models["llama"], {}, point) for step, point in one.points.items()]
    for step, ended in zip(one.points, finish_all(jobs), strict=True):
        assert ended.losses == one.whole.losses[step:]
        for name in ("adapter_model.safetensors", "README.md"):
            assert (ended.paths.export / name).read_bytes() == (one.whole.paths.export / name).read_bytes()


def test_killed_at_any_touch_of_a_checkpoint_the_newest_complete_one_is_found(
    killed: dict[str, Killed], models: dict[str, Path], tmp_path: Path
) -> None:
    """Bug 14: a checkpoint is half written when the machine fails.

    At each thing that rank 0 does to the files of checkpoint 3, until there is none left to die at.
    """
    start = killed["ddp, 1 rank"].points[1]
    found = []
    for nth in range(1, 100):
        job = _job(tmp_path / str(nth), models["llama"], {}, start)
        ended = job.start(die=Die("/step-3", nth)).died()
        if ended.codes == (0,):
            break
        assert ended.codes == (-9,), ended.logs
        newest = manifest_io.newest_complete(job.paths.checkpoints)
        assert newest is not None
        assert checkpoint.read_state(newest) is not None
        found.append(int(newest.name[5:]))
        shutil.rmtree(job.scratch)
    assert len(found) > 5
    assert found == sorted(found)
    assert found[0] == 2
    assert found[-1] > 3  # checkpoint 3 is removed when newer ones are complete
