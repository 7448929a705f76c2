"""fsdp on two nodes of two ranks, each of which holds a copy of the model: the same run as one
whose four ranks share a single copy, with the same checkpoints.

Ranks on one machine stand in for nodes: only their disks and their numbers differ.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages import events
from finetune_api.messages.run import JobRef
from finetune_trainer import manifest
from finetune_trainer.checkpoint import local_folder, reader, sharded
from finetune_trainer.parallel.strategy import TensorSource
from testkit.rows import pairs
from trainer.support import gradient_messages
from trainer.support.forked_ranks import KillPoint
from trainer.support.gradient_messages import GradientMessages
from trainer.support.rank_runs import CheckedRuns, FinishedRun, Job, RunningRanks, finish_each, prepare

_STEPS, _SAVED = 6, 3
_UNLEARNABLE = [{"prompt": "0: define?", "completion": "#$%&" * 10}]  # so that the first evaluation is the best one
_KINDS = ("weights", "optimizer", "best")
_CELLS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": {"dropout": 0.1}},
    "full": {"full": True},
    "nf4": {"quantization": "nf4"},
    "full, bfloat16": {"full": True, "dtype": "bfloat16"},
}
_SHARED: dict[str, Any] = {"world": 4, "nodes": 1, "strategy": "fsdp"}
_COPIES: dict[str, Any] = {"world": 4, "nodes": 2, "strategy": "fsdp"}


def _job(folder: Path, models: dict[str, Path], cell: str, **options: Any) -> Job:
    training = {"max_steps": _STEPS, "eval_every_steps": 2, "micro_batch_size": 1, "global_batch_size": 12}
    options = {**_CELLS[cell], "shards": "always", **options}
    return prepare(
        folder, models["llama"], pairs(36), validation=_UNLEARNABLE, training=training, every=_SAVED, **options
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> CheckedRuns[tuple[str, str]]:
    root = tmp_path_factory.mktemp("hybrid")
    ways = {"shared": _SHARED, "ddp": {"world": 4, "strategy": "ddp"}}
    jobs = {
        (cell, way): _job(root / f"{index}-{way}", models, cell, **options)
        for index, cell in enumerate(_CELLS)
        for way, options in ways.items()
        if way == "shared" or "dtype" not in _CELLS[cell]
    }
    # The processes of a sequence have one node's disk, so runs on two nodes are started one by one.
    alone = {}
    for index, cell in enumerate(_CELLS):
        alone[cell, "copies"] = _job(root / f"{index}-copies", models, cell, **_COPIES).finish()
    alone["full", "gathered"] = _job(root / "gathered", models, "full", **_COPIES, shards="never").finish()
    return CheckedRuns({**finish_each(jobs), **alone})


def _merged(run: FinishedRun, step: int, folder: Path) -> Path:
    """Returns a folder with the files of all nodes for a checkpoint, as each node downloads it."""
    folder.mkdir()
    roots = [run.paths.scratch, run.paths.scratch / "node-1"]
    for root in roots:
        checkpoint = root / "checkpoints" / f"step-{step}"
        if checkpoint.is_dir():
            assert manifest.verify(checkpoint) is None
            for path in checkpoint.iterdir():
                shutil.copy(path, folder)
    (folder / "manifest.json").unlink()
    manifest.write_checkpoint_manifest(folder, JobRef(namespace="default", name="tiny", uid="u-1", attempt=1), step)
    return folder


def _kind(folder: Path, kind: str) -> TensorSource:
    source = reader.open_kind(folder, kind)
    assert source is not None
    return source


def _difference(ours: Path, theirs: Path, kind: str) -> float:
    mine, other = _kind(ours, kind), _kind(theirs, kind)
    assert {name for name in other if not name.startswith("step/")} == mine.keys()
    return max(float((mine[name] - other[name]).abs().max()) for name in mine)


def _result(run: FinishedRun) -> bytes:
    (path,) = run.paths.export.glob("*.safetensors")
    return path.read_bytes()


@pytest.mark.parametrize("cell", _CELLS)
def test_a_copy_on_every_node_trains_like_a_single_one(
    cell: str, runs: CheckedRuns[tuple[str, str]], tmp_path: Path
) -> None:
    copies, shared = runs[cell, "copies"], runs[cell, "shared"]
    mesh = copies.decision("mesh")
    assert (mesh.choice, mesh.reason.split(":")[0]) == ("2 x 2", "it fits within a node")
    float32 = "dtype" not in _CELLS[cell]
    assert len(copies.losses) == _STEPS
    assert copies.losses == pytest.approx(shared.losses, rel=1e-5 if float32 else 5e-3)
    if float32:  # 0033 says how bfloat16 differs
        assert copies.losses == pytest.approx(runs[cell, "ddp"].losses, rel=1e-5)
    merged, single = _merged(copies, _STEPS, tmp_path / "merged"), shared.paths.checkpoints / f"step-{_STEPS}"
    for kind in _KINDS:
        assert _difference(merged, single, kind) < (1e-4 if float32 else 5e-2), kind


@pytest.mark.parametrize("cell", ["full", "LoRA"])
def test_every_value_is_stored_once_and_each_rank_stores_as_much(
    cell: str, runs: CheckedRuns[tuple[str, str]], tmp_path: Path
) -> None:
    folder = _merged(runs[cell, "copies"], _SAVED, tmp_path / "merged")
    assert {path.name for path in folder.glob("*.safetensors")} == {
        sharded.file(kind, rank) for kind in _KINDS for rank in range(4)
    }
    for kind in _KINDS:
        sizes = [(folder / sharded.file(kind, rank)).stat().st_size for rank in range(4)]
        assert max(sizes) < 0.35 * sum(sizes), (kind, sizes)


def test_shards_are_what_is_gathered_bit_for_bit(runs: CheckedRuns[tuple[str, str]], tmp_path: Path) -> None:
    ours, gathered = runs["full", "copies"], runs["full", "gathered"]
    assert ours.losses == gathered.losses
    assert _result(ours) == _result(gathered)
    for step in (_SAVED, _STEPS):
        merged, whole = _merged(ours, step, tmp_path / str(step)), gathered.paths.checkpoints / f"step-{step}"
        for kind in _KINDS:
            assert _difference(merged, whole, kind) == 0


@pytest.mark.parametrize("cell", _CELLS)
def test_a_resumed_run_is_bit_identical(
    cell: str, runs: CheckedRuns[tuple[str, str]], models: dict[str, Path], tmp_path: Path
) -> None:
    whole = runs[cell, "copies"]
    folder = _merged(whole, _SAVED, tmp_path / "merged")
    state = local_folder.read_state(folder)
    assert state is not None
    assert state.mesh == (2, 2)
    again = _job(tmp_path / "again", models, cell, **_COPIES, resume=folder).finish().check()
    assert again.decision("mesh").reason == "the checkpoint was trained with it"
    assert again.losses == whole.losses[_SAVED:]
    assert _result(again) == _result(whole)
    first, second = _merged(whole, _STEPS, tmp_path / "first"), _merged(again, _STEPS, tmp_path / "second")
    for kind in _KINDS:
        assert _difference(first, second, kind) == 0


_OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "copies, then one node": ("copies", _SHARED, ""),
    "copies, then ddp": ("copies", {"world": 2, "strategy": "ddp"}, ""),
    "gathered copies, then copies": ("gathered", _COPIES, "2 x 2"),
    "one node, then two that keep its mesh": ("shared", _COPIES, "1 x 4"),
    "ddp, then copies": ("ddp", _COPIES, "2 x 2"),
}


@pytest.mark.parametrize("way", _OTHERS)
def test_a_checkpoint_resumes_on_another_mesh(
    way: str, runs: CheckedRuns[tuple[str, str]], models: dict[str, Path], tmp_path: Path
) -> None:
    first, options, mesh = _OTHERS[way]
    before = runs["full", first]
    folder = (
        _merged(before, _SAVED, tmp_path / "merged")
        if first == "copies"
        else before.paths.checkpoints / f"step-{_SAVED}"
    )
    then = _job(tmp_path / "then", models, "full", **options, resume=folder).finish().check()
    assert then.events(events.PlanEvent)[0].start_step == _SAVED
    assert [event.choice for event in then.events(events.DecisionEvent) if event.topic == "mesh"] == [mesh] * bool(mesh)
    exact = first == "gathered"
    assert then.losses == (before.losses[_SAVED:] if exact else pytest.approx(before.losses[_SAVED:], rel=1e-5))
    assert _result(then) == _result(before)  # the best weights, which the first run stored


def test_a_run_that_dies_resumes_bit_identically_from_what_all_nodes_have(
    runs: CheckedRuns[tuple[str, str]], models: dict[str, Path], tmp_path: Path
) -> None:
    killed = _job(tmp_path / "killed", models, "LoRA", **_COPIES)
    ended = killed.start(kill_point=KillPoint(f"checkpoints/step-{_STEPS}")).wait_for_crash()
    assert ended.codes[0] != 0
    folder = _merged(ended, _SAVED, tmp_path / "merged")
    again = _job(tmp_path / "again", models, "LoRA", **_COPIES, resume=folder).finish().check()
    assert again.losses == runs["LoRA", "copies"].losses[_SAVED:]
    assert _result(again) == _result(runs["LoRA", "copies"])


@pytest.mark.parametrize(("cell", "units", "within"), [("full", 3, 2), ("LoRA", 2, 1)])
def test_gradients_are_sent_between_nodes_once_per_step(
    cell: str, units: int, within: int, models: dict[str, Path], tmp_path: Path
) -> None:
    """`units` of the model, two layers and the rest, have trained weights.

    A step has two micro-batches of at most 96 tokens. Within a node, the gradients of adapters are
    sent once, too.
    """
    job = _job(tmp_path / "job", models, cell, **_COPIES)
    RunningRanks(job, faults={0: GradientMessages()}).wait().check()
    messages = gradient_messages.read(job.paths)
    assert messages.between_copies == _STEPS * units
    assert messages.within_copies == within * messages.between_copies
