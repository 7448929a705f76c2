"""Sharded checkpoints: what they contain, which runs can resume from them, and what a kill or a
wrong byte does to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from finetune_api.messages import events
from finetune_api.messages.run import JobRef
from finetune_trainer import manifest
from finetune_trainer.checkpoint import local_folder, reader, sharded
from finetune_trainer.checkpoint.local_folder import CheckpointState, Part
from finetune_trainer.errors import RunError
from finetune_trainer.manifest import INDEX
from finetune_trainer.parallel.strategy import TensorSource
from testkit.rows import pairs
from trainer.support import forked_ranks
from trainer.support.checkpoints import newest_complete
from trainer.support.forked_ranks import KillPoint, exit_code_in_a_fork
from trainer.support.rank_runs import FinishedRun, Job, finish_each, prepare

_GIB = 2**30


@pytest.mark.parametrize(
    ("setting", "strategy", "ranks", "trained", "expected", "why"),
    [
        pytest.param("auto", "fsdp", 8, 8 * 10**9, True, "its own part of 89.41 GiB", id="all of 8B"),
        pytest.param("auto", "zero2", 2, 10**6, False, "gathering 0.01 GiB is fast", id="an adapter"),
        pytest.param("auto", "zero3", 1, 10**9, False, "one process", id="one process"),
        pytest.param("always", "zero3", 2, 10**6, True, "set by checkpoint.shards", id="requested"),
        pytest.param("never", "fsdp", 8, 8 * 10**9, False, "set by checkpoint.shards", id="switched off"),
        pytest.param("always", "ddp", 8, 8 * 10**9, False, "everything", id="ddp has no parts"),
    ],
)
def test_shards_are_written_if_there_is_much_to_gather(
    setting: Literal["auto", "always", "never"], strategy: str, ranks: int, trained: int, expected: bool, why: str
) -> None:
    choice, reason = sharded.choose(setting, strategy, ranks, trained)
    assert choice is expected
    assert why in reason


_STEPS, _SAVED = 6, 3
_UNLEARNABLE = [{"prompt": "0: define?", "completion": "#$%&" * 10}]  # so that the first evaluation is the best one


def _job(folder: Path, model: Path, **options: Any) -> Job:
    training = {"max_steps": _STEPS, "eval_every_steps": 2, "scheduler": "cosine", **options.pop("training", {})}
    options = {"world": 2, "full": True, "shards": "always", **options}
    return prepare(folder, model, pairs(24), validation=_UNLEARNABLE, training=training, every=_SAVED, **options)


@dataclass(frozen=True)
class Runs:
    """Finished runs by what they do: the first ones, and those that resumed from the shards of a
    first one."""

    first: dict[str, FinishedRun]
    then: dict[str, FinishedRun]


_FIRST: dict[str, dict[str, Any]] = {
    **{strategy: {"strategy": strategy} for strategy in ("zero2", "zero3", "fsdp")},
    **{f"{way}, gathered": {"strategy": way, "shards": "never"} for way in ("zero2", "zero3", "fsdp")},
}
_THEN: dict[str, tuple[str, dict[str, Any]]] = {
    "zero2, then zero2": ("zero2", {"strategy": "zero2"}),
    "zero3, then zero3": ("zero3", {"strategy": "zero3"}),
    "fsdp, then fsdp": ("fsdp", {"strategy": "fsdp"}),
    "fsdp gathered, then fsdp": ("fsdp, gathered", {"strategy": "fsdp"}),
    "zero3, then fsdp": ("zero3", {"strategy": "fsdp"}),
    "fsdp, then zero1": ("fsdp", {"strategy": "zero1"}),
    "fsdp, then ddp on 1": ("fsdp", {"world": 1}),
    "zero2, then fsdp on 3": ("zero2", {"world": 3, "strategy": "fsdp"}),
    "fsdp, then zero3 on 3": ("fsdp", {"world": 3, "strategy": "zero3"}),
}
_EXACT = [
    way for way, (first, how) in _THEN.items() if first.split(",")[0] == how.get("strategy") and "world" not in how
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Runs:
    root, llama = tmp_path_factory.mktemp("shards"), models["llama"]
    first = finish_each({name: _job(root / f"first-{i}", llama, **how) for i, (name, how) in enumerate(_FIRST.items())})
    jobs = {
        name: _job(root / f"then-{i}", llama, resume=first[at].paths.checkpoints / f"step-{_SAVED}", **how)
        for i, (name, (at, how)) in enumerate(_THEN.items())
    }
    return Runs(first, finish_each(jobs))


def _kind(ended: FinishedRun, step: int, kind: str) -> TensorSource:
    source = reader.open_kind(ended.paths.checkpoints / f"step-{step}", kind)
    assert source is not None
    return source


@pytest.mark.parametrize("way", ["zero2", "zero3", "fsdp"])
def test_all_shards_together_are_what_is_gathered_bit_for_bit(way: str, runs: Runs) -> None:
    ours, gathered = runs.first[way], runs.first[f"{way}, gathered"]
    names = {path.name for path in (ours.paths.checkpoints / f"step-{_SAVED}").iterdir()}
    parts = {f"{kind}-{rank}.safetensors" for kind in ("weights", "optimizer", "best") for rank in (0, 1)}
    assert names == {*parts, INDEX, "state.json", "manifest.json"}
    for step in (_SAVED, _STEPS):
        for kind in ("weights", "optimizer", "best"):
            mine, theirs = _kind(ours, step, kind), _kind(gathered, step, kind)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine), (step, kind)
    assert ours.decision("checkpointShards").choice == "on"
    assert ours.losses == gathered.losses


def test_no_rank_writes_more_than_its_part(runs: Runs) -> None:
    for way in ("zero2", "zero3", "fsdp"):
        folder = runs.first[way].paths.checkpoints / f"step-{_SAVED}"
        for kind in ("weights", "optimizer"):
            sizes = [(folder / sharded.file(kind, rank)).stat().st_size for rank in (0, 1)]
            assert max(sizes) < 0.6 * sum(sizes), (way, kind)


@pytest.mark.parametrize("way", _THEN)
def test_any_world_and_strategy_resumes_from_shards(way: str, runs: Runs) -> None:
    first, then = runs.first[_THEN[way][0]], runs.then[way]
    assert then.events(events.PlanEvent)[0].start_step == _SAVED
    exact = way in _EXACT
    assert then.losses == (first.losses[_SAVED:] if exact else pytest.approx(first.losses[_SAVED:], abs=1e-5))
    for kind in ("weights", "optimizer"):
        before, after = _kind(first, _STEPS, kind), _kind(then, _STEPS, kind)
        names = [name for name in after if not name.startswith("step/")]  # ddp counts them itself
        assert set(names) == before.keys()
        difference = max(float((before[name] - after[name]).abs().max()) for name in names)
        assert difference == 0 if exact else difference < 1e-4


@pytest.mark.parametrize("way", _THEN)
def test_the_best_weights_of_the_first_run_are_the_result_bit_for_bit(way: str, runs: Runs) -> None:
    """The first run stored the best weights in shards, and the second one divided them again."""
    first, then = runs.first[_THEN[way][0]], runs.then[way]
    (saved,) = then.events(events.SavedEvent)
    assert saved.step == 2
    name = "model.safetensors"
    assert (first.paths.export / name).read_bytes() == (then.paths.export / name).read_bytes()


@pytest.mark.parametrize("how", ["always", "never"])
def test_on_two_nodes_each_disk_holds_its_own_shards(
    how: str, runs: Runs, models: dict[str, Path], tmp_path: Path
) -> None:
    job = _job(tmp_path / "job", models["llama"], nodes=2, strategy="fsdp", shards=how)
    ended = job.finish().check()
    one = runs.first["fsdp"]
    name = "model.safetensors"
    assert (ended.paths.export / name).read_bytes() == (one.paths.export / name).read_bytes()
    folders = [job.node(rank).checkpoints / f"step-{_SAVED}" for rank in (0, 1)]
    if how == "never":
        assert not folders[1].exists()
        return
    merged = tmp_path / "merged"
    merged.mkdir()
    for rank, folder in enumerate(folders):
        assert manifest.verify(folder) is None
        own = {path.name for path in folder.glob("*.safetensors")}
        assert own == {f"{kind}-{rank}.safetensors" for kind in ("weights", "optimizer", "best")}
        lines = job.node(rank).rank_events(rank).read_text().splitlines()
        saved = [e for e in map(events.decode, lines) if isinstance(e, events.CheckpointEvent)]
        assert [event.path for event in saved if event.step == _SAVED] == [str(folder)]
        for path in folder.iterdir():
            shutil.copy(path, merged)
    for kind in ("weights", "optimizer", "best"):
        together, theirs = reader.open_kind(merged, kind), _kind(one, _SAVED, kind)
        assert together is not None
        assert all(torch.equal(together[name], theirs[name]) for name in theirs)


@pytest.fixture
def good(runs: Runs, tmp_path: Path) -> Path:
    """A checkpoint root with two complete checkpoints."""
    root = tmp_path / "checkpoints"
    shutil.copytree(runs.first["zero3"].paths.checkpoints, root)
    assert newest_complete(root) == root / f"step-{_STEPS}"
    return root


@pytest.mark.parametrize("how", ["missing", "cut", "altered"])
def test_a_torn_or_altered_shard_invalidates_the_full_checkpoint(how: str, good: Path) -> None:
    """Bug 14: a shard that isn't what its rank wrote."""
    for path in [*sorted((good / f"step-{_STEPS}").glob("*-*.safetensors")), good / f"step-{_STEPS}" / INDEX]:
        content = path.read_bytes()
        path.unlink()
        if how == "cut":
            path.write_bytes(content[: len(content) // 2])
        if how == "altered":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert newest_complete(good) == good / f"step-{_SAVED}", path.name
        with pytest.raises(RunError, match=f"isn't complete: {path.name}"):
            local_folder.read_state(path.parent)
        path.write_bytes(content)
    assert newest_complete(good) == good / f"step-{_STEPS}"


def test_an_index_that_leaves_values_out_is_refused(good: Path) -> None:
    path = good / f"step-{_STEPS}" / INDEX
    index = json.loads(path.read_text())
    name = next(iter(index["tensors"]))
    del index["tensors"][name]["parts"][-1]
    path.write_text(json.dumps(index))
    with pytest.raises(RunError, match=f"doesn't say where all of {name} is"):
        reader.open_kind(path.parent, "weights")


def test_part_of_a_tensor_is_read_from_the_shards_that_hold_it(good: Path) -> None:
    folder = good / f"step-{_STEPS}"
    weights = reader.open_kind(folder, "weights")
    assert weights is not None
    name = "model.embed_tokens.weight"
    full = weights[name].flatten()
    half = len(full) // 2
    for offset, length in ((0, 5), (half - 3, 6), (len(full) - 1, 1), (7, 0), (0, len(full))):
        assert torch.equal(weights.part(name, offset, length), full[offset : offset + length])
    (folder / "weights-1.safetensors").unlink()
    mine = reader.open_kind(folder, "weights")
    assert mine is not None
    assert torch.equal(mine.part(name, 0, half), full[:half])


_WEIGHT = torch.arange(12.0)
_INDEX = sharded.Index(ranks=2, tensors={"w": sharded.ShardedTensor(shape=(3, 4), parts=((0, 0, 8), (1, 8, 4)))})


def _save(root: Path, step: int, kill_point: KillPoint | None = None) -> None:
    """Do what two ranks of one node do when they save, one rank after the other."""
    if kill_point is not None:
        forked_ranks.install(kill_point)
    unfinished = local_folder.begin(root, step)
    for rank, mine in ((1, _WEIGHT[8:] + step), (0, _WEIGHT[:8] + step)):
        moments = {f"{moment}/w": mine.clone() for moment in ("exp_avg", "exp_avg_sq")}
        part = Part(rank, range(2), _INDEX, {"weights": {"w": mine.clone()}, "optimizer": moments}, None)
        job = JobRef(namespace="ns", name="job", uid="u", attempt=1)
        local_folder.save_part(unfinished, CheckpointState(step=step), part, job=job)


def test_killed_at_any_access_to_shards_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    """Bug 14: a checkpoint is half written, at each file that either rank writes, renames or
    removes."""
    newest_steps, before = [], tmp_path / "before"
    _save(before, 1)
    _save(before, 2)
    for nth in range(1, 100):
        root = tmp_path / str(nth)
        shutil.copytree(before, root)
        ended = exit_code_in_a_fork(_save, root, 3, KillPoint("/step-", nth))
        newest = newest_complete(root)
        assert newest is not None
        step = int(newest.name[5:])
        weights = reader.open_kind(newest, "weights")
        assert weights is not None
        assert torch.equal(weights["w"], (_WEIGHT + step).view(3, 4))
        newest_steps.append(step)
        if ended == 0:
            break
        assert ended == -9
    assert len(newest_steps) > 15
    assert newest_steps == sorted(newest_steps)
    assert (newest_steps[0], newest_steps[-1]) == (2, 3)


@pytest.mark.parametrize("nth", [4, 9])
def test_killed_while_it_writes_its_shard_a_run_resumes_from_the_one_before(
    nth: int, runs: Runs, models: dict[str, Path], tmp_path: Path
) -> None:
    job = _job(tmp_path / "job", models["llama"], strategy="fsdp")
    ended = job.start(kill_point=KillPoint(f"/step-{_STEPS}", nth)).wait_for_crash()
    assert ended.codes[0] == -9, ended.logs
    newest = newest_complete(job.paths.checkpoints)
    assert newest == job.paths.checkpoints / f"step-{_SAVED}"
    again = _job(tmp_path / "again", models["llama"], strategy="fsdp", resume=newest).finish().check()
    assert again.losses == runs.first["fsdp"].losses[_SAVED:]
