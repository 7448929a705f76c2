"""Ranks that share rows compute what one rank computes from whole rows: the loss, the gradient of
every weight, and a run from its first step to its result.

test_invariance.py compares full runs with a naive loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config, T5Config

from finetune_api.messages import events
from finetune_trainer.checkpoint import local_folder
from finetune_trainer.data.batching.batch_plan import MicroBatch
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.batching.sequence_part import WHOLE, SequencePart, key_copies
from finetune_trainer.errors import RunError
from finetune_trainer.model.check import shared_rows as model_check
from finetune_trainer.parallel.sequence import groups
from testkit import tiny_models
from testkit.rows import pairs
from trainer.support import row_exchanges, shared_rows
from trainer.support.forked_ranks import KillPoint
from trainer.support.rank_runs import FinishedRun, Job, RunningRanks, finish_each, in_parallel, prepare
from trainer.support.row_exchanges import RowExchanges
from trainer.support.shared_rows import SharedRow

_FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_models.tiny_llama,
    "gpt2": tiny_models.tiny_gpt2,
    "qwen3": tiny_models.tiny_qwen3,
    "mistral with a window": partial(tiny_models.tiny_mistral, window=16),
    "gemma2 with a window": partial(tiny_models.tiny_gemma2, window=16),
    "gpt-oss": tiny_models.tiny_gpt_oss,
}
_LONG = {"prompt": "define: " + "the quick lazy dog " * 4, "completion": " again and again."}
_ROWS = [*pairs(11), _LONG]
_LAST = len(_ROWS) - 1
_MICRO_BATCHES: dict[str, tuple[MicroBatch, bool]] = {
    "several documents": (tuple(range(11)), False),
    "shared prefixes": (tuple(range(0, 11, 2)), True),
    "one long document whose targets are in one part": ((_LAST,), False),
    "one short document, otherwise padding": ((0,), False),
}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    return path


def _without_dropout(folder: Path) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    still = {key: 0.0 for key, value in config.items() if "drop" in key and isinstance(value, float)}
    path.write_text(json.dumps({**config, **still}))
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_shared_row_has_the_loss_and_the_gradients_of_a_whole_one(
    ranks: int, rows_file: Path, tmp_path: Path
) -> None:
    """With 2 key heads for 4 query heads, 4 ranks get copies of keys. Float32 rounds to 6e-8, and a
    gradient sums some hundred products in another order."""
    cases: dict[tuple[str, str], SharedRow] = {}
    for family, build in _FAMILIES.items():
        model = _without_dropout(build(tmp_path / family))
        for name, (examples, shared) in _MICRO_BATCHES.items():
            cases[family, name] = SharedRow(model, rows_file, examples, shared)
    results = dict(zip(cases, shared_rows.compare(list(cases.values()), ranks, tmp_path / "ranks"), strict=True))
    for case, result in results.items():
        assert result.divided == pytest.approx(result.whole, rel=2e-6), case
        assert result.difference < 1e-5, case
        assert result.weights > 10
        assert result.length % (32 * ranks) == 0
    assert 0 in results["llama", "one short document, otherwise padding"].targets
    assert all(results["llama", "several documents"].targets[:-1])


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_parts_of_a_row_have_its_tokens_positions_and_targets(parts: int, rows_file: Path, tmp_path: Path) -> None:
    """The last token of a part predicts the first one of the next part."""
    split = shared_rows.tokens(tiny_models.tiny_llama(tmp_path / "model"), rows_file, tmp_path / "tokens")
    examples = tuple(range(len(split)))
    for grain in (1, 32):
        size = -(-int(split.lengths.sum()) // (grain * parts)) * grain * parts
        whole = Collator(True, False, False, 0, 0, torch.device("cpu"), grain=grain * parts)(split, examples)
        own = [
            Collator(
                True, False, False, 0, 0, torch.device("cpu"), sequence=SequencePart(rank, parts, "g"), grain=grain
            )(split, examples)
            for rank in range(parts)
        ]
        for name in ("input_ids", "position_ids"):
            assert torch.equal(torch.cat([batch.inputs[name] for batch in own], dim=1), whole.inputs[name])
        targets = torch.full(whole.targets.shape, -1)
        predicted_at = torch.full(whole.targets.shape, -1)
        for rank, batch in enumerate(own):
            assert batch.layout == whole.layout
            assert batch.inputs["input_ids"].shape[1] == size // parts
            assert batch.keep is not None
            indices = torch.from_numpy(batch.own)
            targets[indices] = batch.targets
            predicted_at[indices] = batch.keep[batch.chosen] + rank * size // parts
        assert whole.keep is not None
        assert torch.equal(targets, whole.targets)
        assert torch.equal(predicted_at, whole.keep[whole.chosen])


def test_a_part_is_an_equal_share_of_the_row() -> None:
    assert SequencePart(1, 4).columns(16) == slice(4, 8)
    assert SequencePart(1, 4).within(np.array([3, 4, 7, 8]), 16).tolist() == [1, 2]
    assert (bool(WHOLE), bool(SequencePart(0, 2))) == (False, True)


@pytest.mark.parametrize(
    ("kv_heads", "size", "copies"), [(8, 1, 1), (8, 2, 1), (8, 8, 1), (8, 16, 2), (1, 4, 4), (2, 4, 2), (6, 4, 2)]
)
def test_each_rank_gets_as_many_key_heads(kv_heads: int, size: int, copies: int) -> None:
    assert key_copies(kv_heads, size) == copies
    assert kv_heads * copies % size == 0


def test_groups_are_consecutive_ranks() -> None:
    assert groups.members(8, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups.members(3, 1) == [[0], [1], [2]]
    with pytest.raises(RunError, match="sequenceParallelSize 3 doesn't divide the 8 processes") as refusal:
        groups.members(8, 3)
    assert refusal.value.reason == "InvalidConfig"


_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "size", "obstacle", "parts"),
    [
        pytest.param(LlamaConfig(hidden_size=48, num_attention_heads=12), 4, "", (), id="a divisor"),
        pytest.param(LlamaConfig(hidden_size=56, num_attention_heads=14), 1, "", (), id="whole rows"),
        pytest.param(
            LlamaConfig(hidden_size=56, num_attention_heads=14), 4, "", ("Size 4", "14 attention heads", "both 14 and"),
            id="heads that can't be divided",
        ),
        pytest.param(
            Phi3Config(num_attention_heads=8, hidden_size=64, original_max_position_embeddings=32,
                       max_position_embeddings=64, rope_parameters=_LONGROPE),
            2, "", ("longrope", "longest position", "set it to 1"), id="positions that depend on the longest one",
        ),
        pytest.param(
            T5Config(), 2, "an encoder-decoder reads one example per row", ("only packed rows", "set it to 1"),
            id="examples that can't share a row",
        ),
    ],
)  # fmt: skip
def test_a_model_whose_rows_cannot_be_shared_is_refused_by_its_configuration(
    config: Any, size: int, obstacle: str, parts: tuple[str, ...]
) -> None:
    if not parts:
        model_check.check(config, size, obstacle)
        return
    with pytest.raises(RunError) as refusal:
        model_check.check(config, size, obstacle)
    assert refusal.value.reason == "InvalidConfig"
    for part in ("distribution.sequenceParallelSize", *parts):
        assert part in refusal.value.message


_STEPS, _SAVED = 6, 4
_CELLS: dict[str, dict[str, Any]] = {
    "LoRA, ddp": {"world": 2, "sequence": 2, "lora": {"dropout": 0.1}},
    "full, fsdp": {"world": 2, "sequence": 2, "strategy": "fsdp", "full": True},
}


def _job(folder: Path, models: dict[str, Path], cell: str, **options: Any) -> Job:
    training = {"max_steps": _STEPS, "eval_every_steps": 2, "global_batch_size": 12}
    return prepare(
        folder, models["llama"], pairs(36), validation=pairs(5, 1), training=training, every=2,
        **{**_CELLS[cell], **options},
    )  # fmt: skip


def _result(run: FinishedRun) -> bytes:
    (path,) = run.paths.export.glob("*.safetensors")
    return path.read_bytes()


@pytest.mark.parametrize("cell", _CELLS)
def test_a_run_that_dies_resumes_bit_identically(cell: str, models: dict[str, Path], tmp_path: Path) -> None:
    killed = _job(tmp_path / "killed", models, cell)

    def die() -> FinishedRun:
        return killed.start(kill_point=KillPoint(f"checkpoints/step-{_STEPS}")).wait_for_crash()

    whole, ended = in_parallel([lambda: _job(tmp_path / "whole", models, cell).finish().check(), die])
    assert ended.codes[0] != 0
    folder = killed.paths.checkpoints / f"step-{_SAVED}"
    assert local_folder.read_state(folder) is not None
    again = _job(tmp_path / "again", models, cell, resume=folder).finish().check()
    assert again.events(events.PlanEvent)[0].start_step == _SAVED
    assert again.losses == whole.losses[_SAVED:]
    assert _result(again) == _result(whole)


def test_preference_pairs_in_shared_rows_have_the_same_losses_and_rewards(
    models: dict[str, Path], tmp_path: Path
) -> None:
    pairs_of_answers = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " " + row["prompt"][::-1]}
        for row in pairs(20)
    ]
    jobs = {
        ranks: prepare(
            tmp_path / str(ranks), models["llama"], pairs_of_answers[:12], validation=pairs_of_answers[12:16],
            test=pairs_of_answers[16:], data={"format": "preference"}, world=ranks, sequence=ranks,
            training={"objective": "dpo", "eval_every_steps": 2},
        )
        for ranks in (1, 2)
    }  # fmt: skip
    runs = finish_each(jobs)
    whole, shared = runs[1], runs[2]
    assert shared.decision("sequenceParallel").choice == "2"
    assert shared.losses == pytest.approx(whole.losses, rel=1e-5)
    for split in ("validation", "test"):
        assert shared.evals(split) == pytest.approx(whole.evals(split), rel=1e-5)
    for ours, theirs in zip(shared.events(events.StepEvent), whole.events(events.StepEvent), strict=True):
        assert ours.rewards is not None
        assert theirs.rewards is not None
        assert ours.rewards.model_dump() == pytest.approx(theirs.rewards.model_dump(), rel=1e-4, abs=1e-5)
    scores = [run.events(events.ScoresEvent)[0].evaluation.scores for run in (shared, whole)]
    assert [score.name for score in scores[0]] == ["perplexity"]
    assert scores[0][0].tuned == pytest.approx(scores[1][0].tuned, rel=1e-5)


def test_rows_are_exchanged_within_each_group_only(models: dict[str, Path], tmp_path: Path) -> None:
    job = _job(tmp_path / "job", models, "LoRA, ddp", world=4)
    run = RunningRanks(job, faults=dict.fromkeys(range(4), RowExchanges())).wait().check()
    decision = run.decision("sequenceParallel")
    assert decision.choice == "2"
    assert "2 groups of processes share rows" in decision.reason
    counts = [row_exchanges.read(job.paths, rank) for rank in range(4)]
    assert [set(count) for count in counts] == [{(0, 1)}, {(0, 1)}, {(2, 3)}, {(2, 3)}]
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]


def test_a_run_resumes_with_other_groups(models: dict[str, Path], tmp_path: Path) -> None:
    """The stream of examples is the same; only sums are rounded differently."""
    shared = _job(tmp_path / "shared", models, "LoRA, ddp", lora={"dropout": 0.0}).finish().check()
    folder = shared.paths.checkpoints / f"step-{_SAVED}"
    whole = _job(tmp_path / "whole", models, "LoRA, ddp", lora={"dropout": 0.0}, sequence=1, resume=folder)
    assert whole.finish().check().losses == pytest.approx(shared.losses[_SAVED:], rel=1e-5)


def test_heads_that_cannot_be_divided_end_a_run_before_its_first_step(models: dict[str, Path], tmp_path: Path) -> None:
    ended = _job(tmp_path / "job", models, "LoRA, ddp", world=3, sequence=3).finish()
    assert ended.failure.reason == "InvalidConfig"
    assert "4 attention heads can't be divided among 3 processes" in ended.failure.message
    assert not ended.events(events.StepEvent)
