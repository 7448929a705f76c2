"""Steps that go wrong: refused, done again in smaller pieces, or undone; never learnt, never forgotten by a restart."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api import events
from finetune_api.reasons import REASONS
from finetune_api.run import JobRef
from finetune_trainer import checkpoint, guards, manifest_io, plan, stored, tokenizer_files
from finetune_trainer.checkpoint import State
from finetune_trainer.guards import Skipped, Spike
from trainer.faults import Fault
from trainer.forked import ended_in_a_fork
from trainer.ranks import Ended, Job, Ranks, at_once, finish_all, finish_each, pairs, prepare

_BAD = 3  # the step that holds the poisoned row
_STEPS = 6
_SCARCE = Fault("memory", 128)  # tokens that can be embedded at once; halved rows have as many at most


def _poisoned(base: Path, folder: Path) -> Path:
    """A base in which the embedding of one token, @, is infinite: only rows that hold it are poisoned."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    token = tokenizer_files.load(folder)("@", add_special_tokens=False).input_ids[0]
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _at(step: int, rows: int, batch: int) -> list[int]:
    """The rows of a step in the first epoch."""
    return [int(row) for row in plan.order(42, 0, rows)[(step - 1) * batch : step * batch]]


def _rows_with_poison() -> list[dict[str, str]]:
    rows = pairs(8 * _STEPS)
    rows[_at(_BAD, len(rows), 8)[5]] = {"prompt": "@", "completion": "poison"}
    return rows


_WAYS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "2 ranks": {"world": 2},
    "2 ranks, zero2": {"world": 2, "strategy": "zero2"},
    "2 ranks, zero3": {"world": 2, "strategy": "zero3"},
}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Ended]:
    """By way, and once more, as "… again", gone on with from the checkpoint before the last."""
    root = tmp_path_factory.mktemp("poisoned")
    base = _poisoned(models["qwen2"], root / "base")

    def job(name: str, way: dict[str, Any], resume: Path | None = None) -> Job:
        training = {"max_steps": _STEPS}
        return prepare(root / name, base, _rows_with_poison(), training=training, every=1, resume=resume, **way)

    whole = finish_each({name: job(name, way) for name, way in _WAYS.items()})
    points = {name: whole[name].paths.checkpoints / f"step-{_STEPS - 1}" for name in _WAYS}
    return whole | finish_each(
        {f"{name} again": job(f"{name} again", way, points[name]) for name, way in _WAYS.items()}
    )


@pytest.mark.parametrize("way", _WAYS)
def test_a_resumed_run_counts_the_refused_steps_of_the_one_before(way: str, poisoned: dict[str, Ended]) -> None:
    whole, again = poisoned[way], poisoned[f"{way} again"]
    assert again.losses == whole.losses[-1:]
    name = "adapter_model.safetensors"
    assert (again.paths.export / name).read_bytes() == (whole.paths.export / name).read_bytes()
    state = checkpoint.read_state(again.paths.checkpoints / f"step-{_STEPS}")
    assert state is not None
    assert state.updates == _STEPS - 1


@pytest.mark.parametrize("way", _WAYS)
def test_a_step_whose_loss_isnt_finite_changes_neither_weights_nor_moments(
    way: str, poisoned: dict[str, Ended]
) -> None:
    """Bug 23: the rows are told and remembered, and the loss of no other step is touched."""
    ended = poisoned[way]
    assert [event.step for event in ended.events(events.StepEvent)] == [1, 2, 4, 5, 6]
    (skipped,) = ended.events(events.SkippedEvent)
    assert (skipped.first, skipped.step, skipped.reason) == (_BAD, _BAD, "NonFiniteLoss")
    assert _at(_BAD, 8 * _STEPS, 8)[5] + 1 in skipped.rows
    state = checkpoint.read_state(ended.paths.checkpoints / f"step-{_STEPS}")
    assert state is not None
    assert [(some.first, some.last) for some in state.skipped] == [(_BAD, _BAD)]
    assert state.updates == _STEPS - 1
    assert ended.losses == pytest.approx(poisoned["1 rank"].losses, abs=1e-5)


def test_a_gradient_that_isnt_finite_is_refused_too(tmp_path: Path, models: dict[str, Path]) -> None:
    """The loss is finite, the gradient of one micro-batch on rank 1 isn't."""
    rows = _rows_with_poison()
    token = tokenizer_files.load(models["qwen2"])("@", add_special_tokens=False).input_ids[0]
    jobs = [
        prepare(tmp_path / name, models["qwen2"], rows, training={"max_steps": _STEPS}, **way)
        for name, way in _WAYS.items()
        if "2" in name
    ]
    for ended in finish_all(jobs, faults={rank: Fault("gradient", int(token)) for rank in (0, 1)}):
        assert [event.step for event in ended.events(events.StepEvent)] == [1, 2, 4, 5, 6]
        (skipped,) = ended.events(events.SkippedEvent)
        assert (skipped.step, skipped.reason, len(skipped.rows)) == (_BAD, "NonFiniteGradient", 8)


def _large(folder: Path, model: Path, **options: Any) -> Job:
    """Micro-batches of more than a hundred tokens on two ranks."""
    training = {"max_steps": _STEPS, "scheduler": "cosine"}
    return prepare(folder, model, pairs(40), world=2, training=training, **options)


def test_a_rank_that_runs_out_of_memory_makes_all_compute_less_at_once(tmp_path: Path, models: dict[str, Path]) -> None:
    """Bug 24: the global batch and the loss stay what they are, and nobody hangs. What is measured at the end is
    computed in smaller pieces too."""
    ways: dict[str, dict[str, Any]] = {
        "packed": {}, "padded": {"data": {"packing": False}}, "zero1": {"strategy": "zero1"},
    }  # fmt: skip

    def job(name: str, way: dict[str, Any], **options: Any) -> Job:
        return _large(tmp_path / name, models["llama"], every=3, test=pairs(9, 1), **way, **options)

    plenty = finish_all([job(name, way) for name, way in ways.items()])
    fault = {1: Fault("memory", 70)}
    short = finish_all([job(f"{name}, short", way) for name, way in ways.items()], faults=fault)
    points = [ended.paths.checkpoints / "step-3" for ended in short]
    again = finish_all([job(f"{n}, again", way, resume=at) for (n, way), at in zip(ways.items(), points, strict=True)])
    for before, after, resumed in zip(plenty, short, again, strict=True):
        told = after.events(events.BackoffEvent)
        assert [event.halvings for event in told] == list(range(1, len(told) + 1))
        assert told[0].step == 1
        assert "rank 1: OutOfMemoryError" in told[0].why
        assert after.losses == pytest.approx(before.losses, abs=1e-5)
        assert after.evals("test") == pytest.approx(before.evals("test"), abs=1e-5)
        assert resumed.events(events.PlanEvent)[0].halvings == len(told)
        assert resumed.losses == after.losses[3:]
        assert "had no memory" in resumed.decision("microBatchSize").reason


def test_where_ranks_meet_within_a_micro_batch_the_next_attempt_halves_it(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """Bug 24: a rank that left a collective can't be waited for: all end soon, told why, and begin again with half."""
    ways = ("zero2", "zero3", "fsdp")

    def job(name: str, strategy: str) -> Job:
        return _large(tmp_path / f"{strategy}, {name}", models["llama"], strategy=strategy)

    died = at_once([Ranks(job("short", way), faults={1: _SCARCE}).wait for way in ways])
    for ended in died:
        assert ended.codes == (REASONS["PeerLost"].exit_code, REASONS["OutOfMemory"].exit_code), ended.logs
        assert ended.failure.reason == "OutOfMemory"
    again = [job("again", way) for way in ways]
    for one in again:
        one.paths.halvings.write_text("1")  # as the supervisor does
    (plenty,) = finish_all([job("plenty", "ddp")])
    for after in finish_all(again, faults={1: _SCARCE}):
        assert after.events(events.PlanEvent)[0].halvings == 1
        assert after.losses == pytest.approx(plenty.losses, abs=1e-5)


def test_a_single_example_without_memory_ends_the_attempt(tmp_path: Path, models: dict[str, Path]) -> None:
    job = prepare(tmp_path / "job", models["llama"], pairs(8), training={"max_steps": 2})
    ended = Ranks(job, faults={0: Fault("memory", 5)}).wait()
    assert ended.codes == (70,)
    assert ended.failure.reason == "OutOfMemory"


def test_a_rank_that_is_asked_to_leave_takes_all_along(tmp_path: Path, models: dict[str, Path]) -> None:
    """Bug 15: SIGTERM to rank 1 alone, on a node of its own."""
    job = prepare(tmp_path / "job", models["llama"], pairs(16), world=2, nodes=2, training={"max_steps": 100000})
    ranks = job.start()
    ranks.until(events.StepEvent, 2)
    ranks.processes[1].send_signal(signal.SIGTERM)
    ended = ranks.wait().check()
    (preempted,) = ended.events(events.PreemptedEvent)
    assert preempted.step == ended.events(events.StepEvent)[-1].step
    assert ended.paths.checkpoints / f"step-{preempted.step}" == manifest_io.newest_complete(ended.paths.checkpoints)


_EVERY, _SPIKE = 5, 51
_SPIKED = {"max_steps": 57, "global_batch_size": 2, "learning_rate": 2e-2, "loss_spike": {"action": "rollback"}}


def _garbled() -> list[dict[str, str]]:
    """Rows that are alike, but for those of steps 51 to 53: nothing that was learnt helps there."""
    rows = [{"prompt": f"{k % 4}?", "completion": " the quick fox"} for k in range(120)]
    for step in range(_SPIKE, _SPIKE + guards.LASTING):
        for row in _at(step, len(rows), 2):
            rows[row] = {"prompt": f"{row % 4}?", "completion": " wander tower light ship again aim"}
    return rows


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, tuple[Ended, Ended]]:
    """Runs with a spike, and the same ones gone on with from the checkpoint that was taken right after it."""
    root = tmp_path_factory.mktemp("spiked")
    ways = {
        **{name: way for name, way in _WAYS.items() if "2" in name},
        "2 ranks, zero2, shards": {"world": 2, "strategy": "zero2", "shards": "always"},
        "2 ranks, zero3": {"world": 2, "strategy": "zero3", "shards": "always"},
        "2 ranks, fsdp": {"world": 2, "strategy": "fsdp", "shards": "always"},
    }

    def jobs(prefix: str, points: Mapping[str, Path]) -> list[Job]:
        return [
            prepare(
                root / f"{prefix}{name}", models["llama"], _garbled(), training=_SPIKED, every=_EVERY,
                resume=points.get(name), full=True, **way,
            )
            for name, way in ways.items()
        ]  # fmt: skip

    whole = dict(zip(ways, finish_all(jobs("", {})), strict=True))
    points = {name: ended.paths.checkpoints / f"step-{_SPIKE + 2}" for name, ended in whole.items()}
    resumed = dict(zip(ways, finish_all(jobs("resumed ", points)), strict=True))
    return {name: (whole[name], resumed[name]) for name in ways}


@pytest.mark.parametrize(
    "way", ["2 ranks", "2 ranks, zero2", "2 ranks, zero2, shards", "2 ranks, zero3", "2 ranks, fsdp"]
)
def test_a_loss_spike_is_undone_as_if_its_steps_had_never_been(
    way: str, spiked: dict[str, tuple[Ended, Ended]]
) -> None:
    whole, resumed = spiked[way]
    (spike,) = whole.events(events.SpikeEvent)
    assert (spike.step, spike.action) == (_SPIKE + 2, "rollback")
    (skipped,) = whole.events(events.SkippedEvent)
    assert (skipped.first, skipped.step, skipped.reason) == (_SPIKE, _SPIKE + 2, "LossSpike")
    before, after = (
        stored.open_kind(whole.paths.checkpoints / f"step-{step}", "weights") for step in (_SPIKE - 1, _SPIKE + 2)
    )
    assert before is not None
    assert after is not None
    assert before.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert resumed.losses == whole.losses[_SPIKE + 2 :]
    assert max(resumed.losses) < min(whole.losses[_SPIKE - 1 : _SPIKE + 2])
    name = "model.safetensors"
    assert (resumed.paths.export / name).read_bytes() == (whole.paths.export / name).read_bytes()


@pytest.mark.parametrize("way", ["2 ranks", "2 ranks, fsdp"])
def test_a_loss_spike_is_undone_where_each_node_has_its_own_disk(
    way: str, spiked: dict[str, tuple[Ended, Ended]], models: dict[str, Path], tmp_path: Path
) -> None:
    """Gathered on node 0, which sends them; or in shards, which each node has for itself."""
    how: dict[str, Any] = {"2 ranks": {}, "2 ranks, fsdp": {"strategy": "fsdp", "shards": "always"}}[way]
    how = {"world": 2, "nodes": 2, "full": True, "every": _EVERY, **how}
    ended = prepare(tmp_path / "job", models["llama"], _garbled(), training=_SPIKED, **how).finish().check()
    one = spiked[way][0]
    assert ended.losses == one.losses
    name = "model.safetensors"
    assert (ended.paths.export / name).read_bytes() == (one.paths.export / name).read_bytes()


def _save_with_a_disk_that_ends(root: Path, most: int) -> None:
    """Runs in a process of its own, which the kernel ends at byte `most` of any file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    _save(root, 2)


def _save(root: Path, step: int) -> None:
    tensors = {f"layer.{k}": torch.full((40, 40), float(step)) for k in range(4)}
    moments = {f"exp_avg/{name}": tensor for name, tensor in tensors.items()}
    job = JobRef(namespace="ns", name="job", uid="u", attempt=1)
    aside = checkpoint.begin(root, step)
    checkpoint.save(aside, State(step=step), weights=tensors, moments=moments, job=job)


def test_killed_at_any_byte_of_a_checkpoint_the_one_before_is_taken(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "step-1").iterdir())
    limits = {1, *(size - 1 for size in sizes), sizes[-1] // 2}
    for most in sorted(limits):
        assert ended_in_a_fork(_save_with_a_disk_that_ends, tmp_path, most) == -signal.SIGXFSZ
        assert manifest_io.newest_complete(tmp_path) == tmp_path / "step-1"
    assert ended_in_a_fork(_save_with_a_disk_that_ends, tmp_path, sizes[-1]) == 0
    assert manifest_io.newest_complete(tmp_path) == tmp_path / "step-2"


def _refusals(*steps: int) -> tuple[Skipped, ...]:
    return tuple(Skipped(first=step, last=step, reason="NonFiniteLoss") for step in steps)


@pytest.mark.parametrize(
    ("skipped", "most", "why"),
    [
        pytest.param((), 0, None, id="none"),
        pytest.param(_refusals(4), 0, "1 steps were refused; training.maxSkippedSteps is 0", id="not even one"),
        pytest.param(_refusals(1, 3, 5), 3, None, id="as many as allowed"),
        pytest.param(_refusals(1, 3, 5, 7), 3, "4 steps were refused", id="one too many"),
        pytest.param(_refusals(1, 6, 7, 8), 9, "3 steps in a row", id="three in a row"),
        pytest.param(_refusals(1, 2, 4, 5), 9, None, id="twice two in a row"),
        pytest.param(
            (*_refusals(1), Skipped(first=5, last=90, reason="LossSpike")),
            1,
            None,
            id="undone steps aren't refused ones",
        ),
    ],
)
def test_refused_steps_are_bounded(skipped: tuple[Skipped, ...], most: int, why: str | None) -> None:
    told = guards.too_many(skipped, most)
    assert (told is None) == (why is None)
    assert (why or "") in (told or "")


_NOISY = tuple(2.0 + 0.2 * ((7 * k) % 11 - 5) / 5 for k in range(50))  # 1.8 … 2.2
_FALLING = tuple(3.0 * 0.97**k for k in range(50))


@pytest.mark.parametrize(
    ("losses", "spike"),
    [
        pytest.param((*_NOISY, 9.0, 9.0, 9.0), True, id="it stays up"),
        pytest.param((*_NOISY, 9.0, 9.0, 2.1), False, id="it comes back"),
        pytest.param((*_NOISY, 2.2, 2.6, 2.6), False, id="within the noise"),
        pytest.param((*_FALLING, 0.6, 0.6, 0.6), False, id="falling losses"),
        pytest.param((*[0.010] * 50, 0.014, 0.014, 0.014), False, id="nearly nothing is no reason"),
        pytest.param((*_NOISY[:19], 9.0, 9.0, 9.0), False, id="too few to compare with"),
        pytest.param((*_NOISY[:20], 9.0, 9.0, 9.0), True, id="enough to compare with"),
    ],
)
def test_a_spike_is_a_loss_that_leaves_the_others_behind_for_good(losses: tuple[float, ...], spike: bool) -> None:
    found = guards.spike(losses)
    assert isinstance(found, Spike) == spike
    kept: tuple[float, ...] = ()
    for loss in losses:
        kept = guards.remembered(kept, loss)
    assert guards.spike(kept) == found
