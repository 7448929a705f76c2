"""Steps that go wrong are skipped, repeated in smaller micro-batches, or rolled back; they never
change the weights, and a restart doesn't forget them."""

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

from finetune_api.messages import events
from finetune_api.messages.run import JobRef
from finetune_api.reasons import REASONS
from finetune_trainer.checkpoint import local_folder, reader
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.data import tokenizer
from finetune_trainer.data.batching import batch_plan
from finetune_trainer.training import anomalies
from finetune_trainer.training.anomalies import Skipped, Spike
from testkit.rows import pairs
from trainer.support.checkpoints import newest_complete
from trainer.support.fault_injection import Fault
from trainer.support.forked_ranks import exit_code_in_a_fork
from trainer.support.rank_runs import FinishedRun, Job, RunningRanks, finish_all, finish_each, in_parallel, prepare

_BAD = 3  # the step with the poisoned row
_STEPS = 6
_SCARCE = Fault("memory", 128)  # tokens that can be embedded at a time; halved rows have at most as many


def _poisoned(base: Path, folder: Path) -> Path:
    """Write a copy of `base` in which the embedding of one token, @, is infinite: only rows with
    that token are poisoned."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    token = tokenizer.load(folder)("@", add_special_tokens=False).input_ids[0]
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _at(step: int, rows: int, batch: int) -> list[int]:
    """Return the rows of a step in the first epoch."""
    return [int(row) for row in batch_plan.order(42, 0, rows)[(step - 1) * batch : step * batch]]


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
def poisoned(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    """Finished runs by way, and once more under "… again", resumed from the checkpoint before the
    last."""
    root = tmp_path_factory.mktemp("poisoned")
    base = _poisoned(models["qwen2"], root / "base")

    def job(name: str, way: dict[str, Any], resume: Path | None = None) -> Job:
        training = {"max_steps": _STEPS}
        return prepare(root / name, base, _rows_with_poison(), training=training, every=1, resume=resume, **way)

    first = finish_each({name: job(name, way) for name, way in _WAYS.items()})
    points = {name: first[name].paths.checkpoints / f"step-{_STEPS - 1}" for name in _WAYS}
    return first | finish_each(
        {f"{name} again": job(f"{name} again", way, points[name]) for name, way in _WAYS.items()}
    )


@pytest.mark.parametrize("way", _WAYS)
def test_a_resumed_run_counts_the_skipped_steps_of_the_one_before(way: str, poisoned: dict[str, FinishedRun]) -> None:
    first, again = poisoned[way], poisoned[f"{way} again"]
    assert again.losses == first.losses[-1:]
    name = "adapter_model.safetensors"
    assert (again.paths.export / name).read_bytes() == (first.paths.export / name).read_bytes()
    state = local_folder.read_state(again.paths.checkpoints / f"step-{_STEPS}")
    assert state is not None
    assert state.updates == _STEPS - 1


@pytest.mark.parametrize("way", _WAYS)
def test_a_step_whose_loss_isnt_finite_changes_neither_weights_nor_moments(
    way: str, poisoned: dict[str, FinishedRun]
) -> None:
    """Bug 23: the rows are reported and recorded, and the loss of no other step changes."""
    ended = poisoned[way]
    assert [event.step for event in ended.events(events.StepEvent)] == [1, 2, 4, 5, 6]
    (skipped,) = ended.events(events.SkippedEvent)
    assert (skipped.first, skipped.step, skipped.reason) == (_BAD, _BAD, "NonFiniteLoss")
    assert _at(_BAD, 8 * _STEPS, 8)[5] + 1 in skipped.rows
    state = local_folder.read_state(ended.paths.checkpoints / f"step-{_STEPS}")
    assert state is not None
    assert [(some.first, some.last) for some in state.skipped] == [(_BAD, _BAD)]
    assert state.updates == _STEPS - 1
    assert ended.losses == pytest.approx(poisoned["1 rank"].losses, abs=1e-5)


def test_a_step_whose_gradient_isnt_finite_is_skipped_too(tmp_path: Path, models: dict[str, Path]) -> None:
    """The loss is finite, but the gradient of one micro-batch on rank 1 isn't."""
    rows = _rows_with_poison()
    token = tokenizer.load(models["qwen2"])("@", add_special_tokens=False).input_ids[0]
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
    """A job whose micro-batches have more than a hundred tokens, on two ranks."""
    training = {"max_steps": _STEPS, "scheduler": "cosine"}
    return prepare(folder, model, pairs(40), world=2, training=training, **options)


def test_a_rank_that_runs_out_of_memory_halves_the_micro_batches_of_all_ranks(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """Bug 24: the global batch and the loss don't change, and no rank hangs. The evaluation at the
    end uses smaller micro-batches too."""
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
        backoffs = after.events(events.BackoffEvent)
        assert [event.halvings for event in backoffs] == list(range(1, len(backoffs) + 1))
        assert backoffs[0].step == 1
        assert "rank 1: OutOfMemoryError" in backoffs[0].why
        assert after.losses == pytest.approx(before.losses, abs=1e-5)
        assert after.evals("test") == pytest.approx(before.evals("test"), abs=1e-5)
        assert resumed.events(events.PlanEvent)[0].halvings == len(backoffs)
        assert resumed.losses == after.losses[3:]
        assert "had no memory" in resumed.decision("microBatchSize").reason


def test_if_ranks_meet_within_a_micro_batch_the_next_attempt_halves_it(tmp_path: Path, models: dict[str, Path]) -> None:
    """Bug 24: a rank that left a collective can't be waited for, so all ranks end soon and report
    why, and the next attempt begins with half the micro-batch."""
    ways = ("zero2", "zero3", "fsdp")

    def job(name: str, strategy: str) -> Job:
        return _large(tmp_path / f"{strategy}, {name}", models["llama"], strategy=strategy)

    died = in_parallel([RunningRanks(job("short", way), faults={1: _SCARCE}).wait for way in ways])
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
    ended = RunningRanks(job, faults={0: Fault("memory", 5)}).wait()
    assert ended.codes == (81,)
    assert ended.failure.reason == "InsufficientMemory"
    for part in ("dataset.maxSequenceLength", "resources.memory", "distribution.strategy"):
        assert part in ended.failure.message


def test_an_attempt_that_could_not_be_any_smaller_than_the_last_one_ends(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """Two rows are halved once; packed rows are halved until the longest example is alone."""
    ways: dict[str, dict[str, Any]] = {
        "padded": {"data": {"packing": False}, "training": {"max_steps": 2, "micro_batch_size": 2}},
        "packed": {"training": {"max_steps": 2}},
    }

    def job(name: str, way: dict[str, Any], halvings: int) -> Job:
        one = prepare(tmp_path / f"{name} {halvings}", models["llama"], pairs(8), **way)
        one.paths.halvings.write_text(str(halvings))  # as the supervisor does
        return one

    for ended in finish_all([job(name, way, 1) for name, way in ways.items()]):
        assert ended.losses
    for ended in in_parallel([RunningRanks(job(name, way, 9)).wait for name, way in ways.items()]):
        assert ended.codes == (81,)
        assert ended.failure.reason == "InsufficientMemory"
        assert "dataset.maxSequenceLength" in ended.failure.message


def test_a_rank_that_is_terminated_stops_all_ranks(tmp_path: Path, models: dict[str, Path]) -> None:
    """Bug 15: SIGTERM is sent only to rank 1, which is on a node of its own."""
    job = prepare(tmp_path / "job", models["llama"], pairs(16), world=2, nodes=2, training={"max_steps": 100000})
    ranks = job.start()
    ranks.wait_for_events(events.StepEvent, 2)
    ranks.processes[1].send_signal(signal.SIGTERM)
    ended = ranks.wait().check()
    (preempted,) = ended.events(events.PreemptedEvent)
    assert preempted.step == ended.events(events.StepEvent)[-1].step
    assert ended.paths.checkpoints / f"step-{preempted.step}" == newest_complete(ended.paths.checkpoints)


_EVERY, _SPIKE = 5, 51
_SPIKED = {"max_steps": 57, "global_batch_size": 2, "learning_rate": 2e-2, "loss_spike": {"action": "rollback"}}


def _garbled() -> list[dict[str, str]]:
    """Rows that are equal except those of steps 51 to 53, for which nothing that was trained on
    helps."""
    rows = [{"prompt": f"{k % 4}?", "completion": " the quick fox"} for k in range(120)]
    for step in range(_SPIKE, _SPIKE + anomalies.SPIKE_STEPS):
        for row in _at(step, len(rows), 2):
            rows[row] = {"prompt": f"{row % 4}?", "completion": " wander tower light ship again aim"}
    return rows


@pytest.fixture(scope="module")
def spiked(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]
) -> dict[str, tuple[FinishedRun, FinishedRun]]:
    """Runs with a spike, each with the same run resumed from the checkpoint right after the
    spike."""
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

    first = dict(zip(ways, finish_all(jobs("", {})), strict=True))
    points = {name: ended.paths.checkpoints / f"step-{_SPIKE + 2}" for name, ended in first.items()}
    resumed = dict(zip(ways, finish_all(jobs("resumed ", points)), strict=True))
    return {name: (first[name], resumed[name]) for name in ways}


@pytest.mark.parametrize(
    "way", ["2 ranks", "2 ranks, zero2", "2 ranks, zero2, shards", "2 ranks, zero3", "2 ranks, fsdp"]
)
def test_a_loss_spike_is_rolled_back_as_if_its_steps_had_never_been(
    way: str, spiked: dict[str, tuple[FinishedRun, FinishedRun]]
) -> None:
    first, resumed = spiked[way]
    (spike,) = first.events(events.SpikeEvent)
    assert (spike.step, spike.action) == (_SPIKE + 2, "rollback")
    (skipped,) = first.events(events.SkippedEvent)
    assert (skipped.first, skipped.step, skipped.reason) == (_SPIKE, _SPIKE + 2, "LossSpike")
    before, after = (
        reader.open_kind(first.paths.checkpoints / f"step-{step}", "weights") for step in (_SPIKE - 1, _SPIKE + 2)
    )
    assert before is not None
    assert after is not None
    assert before.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert resumed.losses == first.losses[_SPIKE + 2 :]
    assert max(resumed.losses) < min(first.losses[_SPIKE - 1 : _SPIKE + 2])
    name = "model.safetensors"
    assert (resumed.paths.export / name).read_bytes() == (first.paths.export / name).read_bytes()


@pytest.mark.parametrize("way", ["2 ranks", "2 ranks, fsdp"])
def test_a_loss_spike_is_rolled_back_if_each_node_has_its_own_disk(
    way: str, spiked: dict[str, tuple[FinishedRun, FinishedRun]], models: dict[str, Path], tmp_path: Path
) -> None:
    """The checkpoint is gathered on node 0, which broadcasts it, or it is in shards, which each
    node stores for itself."""
    how: dict[str, Any] = {"2 ranks": {}, "2 ranks, fsdp": {"strategy": "fsdp", "shards": "always"}}[way]
    how = {"world": 2, "nodes": 2, "full": True, "every": _EVERY, **how}
    ended = prepare(tmp_path / "job", models["llama"], _garbled(), training=_SPIKED, **how).finish().check()
    one = spiked[way][0]
    assert ended.losses == one.losses
    name = "model.safetensors"
    assert (ended.paths.export / name).read_bytes() == (one.paths.export / name).read_bytes()


def _save_on_a_full_disk(root: Path, limit: int) -> None:
    """Save in a separate process, which the kernel kills at byte `most` of any file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _save(root, 2)


def _save(root: Path, step: int) -> None:
    tensors = {f"layer.{k}": torch.full((40, 40), float(step)) for k in range(4)}
    moments = {f"exp_avg/{name}": tensor for name, tensor in tensors.items()}
    job = JobRef(namespace="ns", name="job", uid="u", attempt=1)
    unfinished = local_folder.begin(root, step)
    local_folder.save(unfinished, CheckpointState(step=step), weights=tensors, moments=moments, job=job)


def test_killed_at_any_byte_of_a_checkpoint_the_one_before_is_used(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "step-1").iterdir())
    limits = {1, *(size - 1 for size in sizes), sizes[-1] // 2}
    for limit in sorted(limits):
        assert exit_code_in_a_fork(_save_on_a_full_disk, tmp_path, limit) == -signal.SIGXFSZ
        assert newest_complete(tmp_path) == tmp_path / "step-1"
    assert exit_code_in_a_fork(_save_on_a_full_disk, tmp_path, sizes[-1]) == 0
    assert newest_complete(tmp_path) == tmp_path / "step-2"


def _skips(*steps: int) -> tuple[Skipped, ...]:
    return tuple(Skipped(first=step, last=step, reason="NonFiniteLoss") for step in steps)


@pytest.mark.parametrize(
    ("skipped", "most", "why"),
    [
        pytest.param((), 0, None, id="none"),
        pytest.param(_skips(4), 0, "1 steps were skipped; training.maxSkippedSteps is 0", id="not even one"),
        pytest.param(_skips(1, 3, 5), 3, None, id="as many as allowed"),
        pytest.param(_skips(1, 3, 5, 7), 3, "4 steps were skipped", id="one too many"),
        pytest.param(_skips(1, 6, 7, 8), 9, "3 steps in a row", id="three in a row"),
        pytest.param(_skips(1, 2, 4, 5), 9, None, id="twice two in a row"),
        pytest.param(
            (*_skips(1), Skipped(first=5, last=90, reason="LossSpike")),
            1,
            None,
            id="rolled back steps don't count",
        ),
    ],
)
def test_skipped_steps_are_bounded(skipped: tuple[Skipped, ...], most: int, why: str | None) -> None:
    message = anomalies.too_many(skipped, most)
    assert (message is None) == (why is None)
    assert (why or "") in (message or "")


_NOISY = tuple(2.0 + 0.2 * ((7 * k) % 11 - 5) / 5 for k in range(50))  # 1.8 … 2.2
_FALLING = tuple(3.0 * 0.97**k for k in range(50))


@pytest.mark.parametrize(
    ("losses", "spike"),
    [
        pytest.param((*_NOISY, 9.0, 9.0, 9.0), True, id="it stays up"),
        pytest.param((*_NOISY, 9.0, 9.0, 2.1), False, id="it comes back"),
        pytest.param((*_NOISY, 2.2, 2.6, 2.6), False, id="within the noise"),
        pytest.param((*_FALLING, 0.6, 0.6, 0.6), False, id="falling losses"),
        pytest.param((*[0.010] * 50, 0.014, 0.014, 0.014), False, id="a difference near zero is no spike"),
        pytest.param((*_NOISY[:19], 9.0, 9.0, 9.0), False, id="too few to compare with"),
        pytest.param((*_NOISY[:20], 9.0, 9.0, 9.0), True, id="enough to compare with"),
    ],
)
def test_a_spike_is_a_loss_that_stays_above_the_others(losses: tuple[float, ...], spike: bool) -> None:
    spike_event = anomalies.spike(losses)
    assert isinstance(spike_event, Spike) == spike
    recent: tuple[float, ...] = ()
    for loss in losses:
        recent = anomalies.recent(recent, loss)
    assert anomalies.spike(recent) == spike_event
