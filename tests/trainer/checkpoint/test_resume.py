"""A run that was killed or stopped, however often, ends with the same adapter as an uninterrupted
run, bit for bit.

test_kill_anywhere.py does this for every strategy and every step.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune_api.messages import events
from finetune_trainer.checkpoint import local_folder
from finetune_trainer.errors import RunError
from testkit.rows import pairs
from trainer.support.checkpoints import newest_complete
from trainer.support.forked_ranks import KillPoint
from trainer.support.rank_runs import FinishedRun, Job, finish_each, in_parallel, prepare

_STEPS = 14
_LONG = 24  # for a run that is stopped while it trains, at any step


def _job(folder: Path, model: Path, **options: Any) -> Job:
    lora, steps = options.pop("lora", {"dropout": 0.1}), options.pop("steps", _STEPS)
    training = {"max_steps": steps, "scheduler": "cosine", "warmup_ratio": 0.1, "eval_every_steps": 3}
    return prepare(
        folder, model, pairs(21), lora=lora, validation=0.2, test=pairs(5, 2), training=training, every=2, **options
    )


def _killed(job: Job, step: int, keep: Path) -> Path:
    """Kill a run with SIGKILL while it saves `step`, and return the newest complete checkpoint,
    copied to `keep`."""
    ended = job.start(kill_point=KillPoint(f"/step-{step}")).wait_for_crash()
    assert ended.codes[0] == -9, ended.logs
    return _newest(job, f"step-{step - 2}", keep)


def _stopped(job: Job, keep: Path) -> Path:
    """Request a stop of a run, and return the checkpoint that it wrote, copied to `keep`."""
    ranks = job.start()
    ranks.wait_for_events(events.CheckpointEvent, 2)
    job.paths.stop.touch()
    ended = ranks.wait().check()
    (preempted,) = ended.events(events.PreemptedEvent)
    assert not ended.events(events.SavedEvent)
    assert preempted.step < _LONG
    return _newest(job, f"step-{preempted.step}", keep)


def _newest(job: Job, expected: str, keep: Path) -> Path:
    newest = newest_complete(job.paths.checkpoints)
    assert newest == job.paths.checkpoints / expected
    shutil.copytree(newest, keep)
    return keep


@dataclass(frozen=True)
class Pair:
    """An uninterrupted run and a resumed run of the same job."""

    reference: FinishedRun
    resumed: FinishedRun


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Pair]:
    root, llama = tmp_path_factory.mktemp("resume"), models["llama"]
    ways: dict[str, dict[str, Any]] = {
        "killed twice": {},
        "2 ranks, stopped": {"world": 2, "steps": _LONG},
        "2 ranks, full, zero3, killed": {"world": 2, "strategy": "zero3", "full": True},
        "1 rank, then 2": {"lora": {"dropout": 0.0}},
    }

    def interrupted(index: int, name: str, way: dict[str, Any]) -> Path:
        first, keep = _job(root / f"{index}-first", llama, **way), root / f"{index}-a"
        point = _stopped(first, keep) if "stopped" in name else _killed(first, 6, keep)
        if name != "killed twice":
            return point
        return _killed(_job(root / f"{index}-second", llama, resume=point, **way), 10, root / f"{index}-b")

    tasks = [partial(interrupted, index, name, way) for index, (name, way) in enumerate(ways.items())]
    points = dict(zip(ways, in_parallel(tasks), strict=True))
    references = {name: _job(root / f"{i}-reference", llama, **way) for i, (name, way) in enumerate(ways.items())}
    then = {**ways, "1 rank, then 2": {**ways["1 rank, then 2"], "world": 2}}
    for strategy in ("zero3", "fsdp"):
        name = f"1 rank, then {strategy}"
        then[name] = {**then["1 rank, then 2"], "strategy": strategy}
        points[name], references[name] = points["1 rank, then 2"], references["1 rank, then 2"]
    resumed = {
        name: _job(root / f"{i}-resumed", llama, resume=points[name], **way)
        for i, (name, way) in enumerate(then.items())
    }
    ended = finish_each({job.scratch: job for job in (*references.values(), *resumed.values())})
    return {name: Pair(ended[references[name].scratch], ended[resumed[name].scratch]) for name in then}


_EXACT = [
    "killed twice",
    "2 ranks, stopped",
    "2 ranks, full, zero3, killed",
]


@pytest.mark.parametrize("way", _EXACT)
def test_the_result_is_the_same_bit_for_bit(way: str, done: dict[str, Pair]) -> None:
    reference, resumed = done[way].reference.paths.export, done[way].resumed.paths.export
    names = sorted(path.name for path in reference.iterdir())
    assert {"model.safetensors", "adapter_model.safetensors"} & set(names)
    assert names == sorted(path.name for path in resumed.iterdir())
    for name in names:
        assert (reference / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.parametrize("way", _EXACT)
def test_losses_and_evaluations_after_the_resume_are_the_same_numbers(way: str, done: dict[str, Pair]) -> None:
    reference, resumed = done[way].reference, done[way].resumed
    start = resumed.events(events.PlanEvent)[0].start_step
    assert 0 < start < len(reference.losses)
    assert resumed.losses == reference.losses[start:]
    late = {step: loss for step, loss in reference.evals("validation").items() if step > start}
    assert {step: loss for step, loss in resumed.evals("validation").items() if step > start} == late
    assert max(resumed.evals("test").items()) == max(reference.evals("test").items())


@pytest.mark.parametrize("way", ["1 rank, then 2", "1 rank, then zero3", "1 rank, then fsdp"])
def test_another_world_or_strategy_resumes_from_the_same_checkpoint(way: str, done: dict[str, Pair]) -> None:
    """Bug 11: a changed world size silently changes the order of the data."""
    reference, resumed = done[way].reference, done[way].resumed
    start = resumed.events(events.PlanEvent)[0].start_step
    assert resumed.losses == pytest.approx(reference.losses[start:], abs=1e-5)
    ours = load_file(reference.paths.export / "adapter_model.safetensors")
    theirs = load_file(resumed.paths.export / "adapter_model.safetensors")
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-4, name


def test_the_test_loss_of_the_base_is_measured_once_and_written_to_the_card(done: dict[str, Pair]) -> None:
    assert 0 not in done["killed twice"].resumed.evals("test")
    assert "test, base model" in (done["killed twice"].resumed.paths.export / "README.md").read_text()


@pytest.fixture
def good(done: dict[str, Pair], tmp_path: Path) -> Path:
    """A checkpoint root with two complete checkpoints."""
    root = tmp_path / "checkpoints"
    shutil.copytree(done["killed twice"].reference.paths.checkpoints, root)
    assert newest_complete(root) == root / f"step-{_STEPS}"
    return root


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "altered"])
def test_a_torn_checkpoint_is_skipped_for_the_one_before(name: str, how: str, good: Path) -> None:
    """Bug 14: the newest folder is used, complete or not."""
    torn = good / f"step-{_STEPS}" / name
    content = torn.read_bytes()
    torn.unlink()
    if how == "cut":
        torn.write_bytes(content[: len(content) // 2])
    if how == "altered" and name != "manifest.json":
        torn.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert newest_complete(good) == good / f"step-{_STEPS - 2}"
    with pytest.raises(RunError, match="isn't complete"):
        local_folder.read_state(torn.parent)


def test_a_half_written_folder_is_not_a_checkpoint(good: Path) -> None:
    (good / f"step-{_STEPS}").rename(good / f"step-{_STEPS}.tmp")
    assert newest_complete(good) == good / f"step-{_STEPS - 2}"


def test_only_two_checkpoints_stay_on_the_disk(done: dict[str, Pair]) -> None:
    for pair in done.values():
        steps, last = (
            {path.name for path in pair.reference.paths.checkpoints.iterdir()},
            len(pair.reference.losses),
        )
        assert steps == {f"step-{last}", f"step-{last - 2}"}


def test_rows_that_changed_since_the_checkpoint_are_refused(
    done: dict[str, Pair], models: dict[str, Path], tmp_path: Path
) -> None:
    job = _job(
        tmp_path / "job",
        models["llama"],
        resume=done["killed twice"].reference.paths.checkpoints / f"step-{_STEPS}",
    )
    rows = job.paths.data("train").read_text().splitlines()
    job.paths.data("train").write_text("\n".join([*rows, json.dumps({"prompt": "new", "completion": "row"})]))
    ended = job.finish()
    assert ended.codes == (65,)
    assert ended.failure.reason == "DatasetInvalid"
    assert "changed since the checkpoint" in ended.failure.message
