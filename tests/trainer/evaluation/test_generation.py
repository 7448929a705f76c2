"""Answers of a batch equal the answers one by one, for every model family, and no answer is
generated twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from finetune_api.messages import events
from finetune_api.messages.evaluation import Score
from finetune_api.resource import GenerationSpec
from finetune_trainer.evaluation import generation
from finetune_trainer.evaluation.generation import GenerationSettings
from finetune_trainer.training import final_evaluation
from testkit.rows import pairs
from testkit.tiny_models import tiny_gemma3, tiny_phi3
from trainer.support import collectives
from trainer.support.collectives import CountedAllGathers
from trainer.support.forked_ranks import KillPoint
from trainer.support.full_host import FullHost
from trainer.support.rank_runs import FinishedRun, RunningRanks, finish_each, prepare

_WAYS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "2 ranks": {"world": 2},
    "zero3": {"world": 2, "strategy": "zero3"},
    "fsdp": {"world": 2, "strategy": "fsdp"},
    "full": {"full": True, "training": {"learning_rate": 1e-2}},
}
_ALL = {"metrics": ("rouge", "bleu", "exactMatch", "f1"), "rows": 7, "samples": 2, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def more_models(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("more")
    return {**models, "gemma3": tiny_gemma3(root / "gemma3"), "phi3": tiny_phi3(root / "phi3")}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "t5", "gemma3", "phi3"])
def test_a_batch_gives_the_answers_that_its_prompts_give_one_by_one(family: str, more_models: dict[str, Path]) -> None:
    folder = more_models[family]
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():  # so that the answer depends on the prompt
        for name, weight in model.named_parameters():
            weight.mul_(6.0 if "EncDecAttention" in name else 1.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [list(range(7, 7 + count)) for count in (3, 19, 1, 8, 0)]
    beats: list[int] = []
    settings = GenerationSettings(tokenizer, frozenset({4}), 8, GenerationSpec(), None)

    def answers(batch: list[list[int]]) -> list[generation.Answer]:
        with torch.no_grad():
            return generation.generate(model, batch, settings, seed=0, heartbeat=lambda: beats.append(1))

    together = answers(prompts)
    assert together == [answers([prompt])[0] for prompt in prompts]
    assert len(set(together)) > 1
    assert len(beats) >= 8


def test_an_answer_ends_where_the_models_positions_end(models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["gpt2"])
    settings = GenerationSettings(tokenizer, frozenset(), 64, GenerationSpec(), positions=512)
    with torch.no_grad():
        (answer,) = generation.generate(model, [[9] * 508], settings, seed=0, heartbeat=lambda: None)
    assert not answer.finished
    assert len(tokenizer(answer.text).input_ids) <= 8


def test_sampling_with_the_same_seed_is_repeatable(models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    settings = GenerationSettings(tokenizer, frozenset({4}), 12, GenerationSpec(temperature=1.0, top_p=0.9), None)
    first, again, other = (
        generation.generate(model, [[7, 8, 9]], settings, seed=seed, heartbeat=lambda: None) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("lengths", "new", "tokens", "expected"),
    [
        ([], 4, 100, []),
        ([5, 9, 5, 7], 4, 26, [(1, 3), (0, 2)]),
        ([50], 4, 10, [(0,)]),
        ([1] * 40, 1, 10_000, [tuple(range(32)), tuple(range(32, 40))]),
    ],
)
def test_batches_hold_prompts_of_similar_length(lengths: list[int], new: int, tokens: int, expected: Any) -> None:
    assert generation.batches(lengths, new, tokens) == expected


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    root = tmp_path_factory.mktemp("evaluated")
    jobs = {
        name: prepare(
            root / name.replace(" ", "-"),
            models["llama"],
            pairs(16),
            test=pairs(11, 2),
            evaluation=_ALL,
            **{**way, "training": {"micro_batch_size": 3, "max_steps": 3, **way.get("training", {})}},
        )
        for name, way in _WAYS.items()
    }
    return finish_each(jobs)


def _samples(ended: FinishedRun) -> list[tuple[int | None, str, str, str]]:
    return [(s.row, s.prompt, s.before, s.after) for s in ended.events(events.SampleEvent)]


def _figures(score: Score) -> tuple[float, ...]:
    return score.base, score.tuned, score.low, score.high


def test_every_strategy_gives_the_same_answers_and_scores(ended: dict[str, FinishedRun]) -> None:
    plain = ended["1 rank"]
    assert [row for row, *_ in _samples(plain)] == [1, 2, 4, 5, 7, 8, 10]  # evenly, of 11
    (scored,) = plain.events(events.ScoresEvent)
    names = [score.name for score in scored.evaluation.scores]
    assert names == ["rouge1", "rouge2", "rougeL", "bleu", "exactMatch", "f1", "perplexity"]
    for way in ("2 ranks", "zero3", "fsdp"):
        assert _samples(ended[way]) == _samples(plain)
        (other,) = ended[way].events(events.ScoresEvent)
        for ours, theirs in zip(scored.evaluation.scores, other.evaluation.scores, strict=True):
            assert _figures(theirs) == pytest.approx(_figures(ours), rel=1e-4)


def test_full_training_is_compared_with_the_model_before_it(ended: dict[str, FinishedRun]) -> None:
    base = [before for _, _, before, _ in _samples(ended["1 rank"])]
    assert [before for _, _, before, _ in _samples(ended["full"])] == base
    assert any(before != after for _, _, before, after in _samples(ended["full"]))


@pytest.mark.parametrize("way", _WAYS)
def test_perplexity_is_the_test_loss(way: str, ended: dict[str, FinishedRun]) -> None:
    (scored,) = ended[way].events(events.ScoresEvent)
    perplexity = scored.evaluation.scores[-1]
    losses = ended[way].evals("test")
    assert (perplexity.base, perplexity.tuned) == pytest.approx([torch.e**loss for loss in losses.values()], rel=1e-5)
    assert perplexity.low <= perplexity.difference <= perplexity.high
    assert perplexity.rows == 11


def test_what_was_answered_before_a_kill_is_not_generated_again(tmp_path: Path, models: dict[str, Path]) -> None:
    """The run is killed while it writes the second batch of the tuned model's answers. The next
    attempt resumes from the last checkpoint and generates only the missing answers. Stored answers
    are trusted, so a mark that the test adds to one of them shows up."""
    job = prepare(
        tmp_path / "run", models["llama"], pairs(16), test=pairs(9, 2),
        evaluation=_ALL, training={"micro_batch_size": 1},
    )  # fmt: skip
    died = job.start(kill_point=KillPoint("answers/tuned", 2)).wait_for_crash()
    assert -9 in died.codes
    stored = next((job.scratch / "answers").glob("tuned-*.jsonl"))
    lines = stored.read_text().splitlines()
    assert 0 < len(lines) < 4
    name, text, finished = json.loads(lines[0])
    stored.write_text("\n".join([json.dumps([name, f"{text} (marked)", finished]), *lines[1:], '["torn']))
    job.paths.resume.symlink_to(max((job.scratch / "checkpoints").iterdir(), key=lambda p: int(p.name[5:])))
    shutil.rmtree(job.paths.events)  # as the supervisor does
    again = job.finish().check()
    assert not again.losses
    answers = [after for *_, after in _samples(again)]
    assert sum(answer.endswith("(marked)") for answer in answers) == 1
    assert len(answers) == 7


def test_a_stop_during_generation_takes_effect(tmp_path: Path, models: dict[str, Path]) -> None:
    job = prepare(
        tmp_path / "run", models["llama"], pairs(16), test=pairs(9, 2),
        evaluation=_ALL, training={"micro_batch_size": 1},
    )  # fmt: skip
    job.paths.stop.touch()
    ended = job.finish().check()
    assert [event.step for event in ended.events(events.PreemptedEvent)] == [0]
    assert not ended.losses
    (stored,) = (job.scratch / "answers").iterdir()
    assert 0 < len(stored.read_text().splitlines()) < 4


_SHARDED = ("fsdp", "zero3")


@pytest.mark.parametrize("strategy", _SHARDED)
def test_generating_a_token_gathers_nothing(strategy: str, tmp_path: Path, models: dict[str, Path]) -> None:
    """Sharded weights were gathered for every token. Now they are gathered once for all answers."""
    job = prepare(
        tmp_path / "job",
        models["llama"],
        pairs(8),
        test=pairs(3, 2),  # one batch, so that one of the ranks has none
        world=2,
        strategy=strategy,
        training={"max_steps": 2},
        evaluation={"metrics": ("f1",), "rows": 3, "samples": 3, "max_new_tokens": 12},
    )
    ended = RunningRanks(job, faults=dict.fromkeys((0, 1), CountedAllGathers())).wait().check()
    counts = [collectives.read(ended.paths, rank) for rank in (0, 1)]
    assert sum(count.tokens for count in counts) >= 12
    assert [count.all_gathers for count in counts] == [0, 0]
    assert len(ended.events(events.SampleEvent)) == 3


@pytest.mark.parametrize(
    ("needed", "free", "skipped"),
    [(10 * 2**30, 13 * 2**30, False), (10 * 2**30, 12 * 2**30, True), (0, 0, False)],
)
def test_answers_are_skipped_with_a_reason_if_the_full_model_doesnt_fit(needed: int, free: int, skipped: bool) -> None:
    reason = final_evaluation.skip_reason(needed, free, "fsdp")
    assert bool(reason) is skipped
    if skipped:
        for part in ("13.00 GiB", "12.00 GiB are free", "strategy fsdp", "evaluation.samples"):
            assert part in reason


def test_a_run_without_memory_for_the_full_model_skips_its_answers_and_reports_why(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    job = prepare(
        tmp_path / "job",
        models["llama"],
        pairs(8),
        test=pairs(3, 2),
        world=2,
        strategy="fsdp",
        training={"max_steps": 2},
        evaluation={"metrics": ("f1",), "rows": 3, "samples": 3, "max_new_tokens": 4},
    )
    ended = RunningRanks(job, faults=dict.fromkeys((0, 1), FullHost())).wait().check()
    decision = ended.decision("answers")
    assert (decision.choice, "0.00 GiB are free" in decision.reason) == ("skipped", True)
    assert ended.events(events.SampleEvent) == []
    (scores,) = ended.events(events.ScoresEvent)
    assert (scores.evaluation.answered, [score.name for score in scores.evaluation.scores]) == (0, ["perplexity"])
    assert set(ended.evals("test")) == {0, 2}
