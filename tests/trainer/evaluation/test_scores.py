"""Scores equal those of the standard packages, intervals have their nominal coverage, and nothing
depends on chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from finetune_trainer.evaluation import scores
from finetune_trainer.evaluation.scores import Texts

_REFERENCE = ["a tower with a light", "Move about aimlessly, or wander!", "the quick brown fox jumps", "ships at sea"]
_BASE = ["a light", "", "the quick red fox jumped over", "no idea"]
_TUNED = ["a tower with light", "move about or wander", "the quick brown fox jumps", "ships in the sea"]
_TEXTS = Texts(_REFERENCE, _BASE, _TUNED)


def _score(name: str, metric: str, texts: Texts = _TEXTS) -> tuple[float, float]:
    by_name = {score.name: score for score in scores.scores([metric], texts, 0)}
    return by_name[name].base, by_name[name].tuned


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores(name: str) -> None:
    theirs = RougeScorer([name])
    for answers, ours in zip((_BASE, _TUNED), _score(name, "rouge"), strict=True):
        values = [theirs.score(r, a)[name].fmeasure for r, a in zip(_REFERENCE, answers, strict=True)]
        assert ours == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_bleu_is_sacrebleus_corpus_bleu() -> None:
    for answers, ours in zip((_BASE, _TUNED), _score("bleu", "bleu"), strict=True):
        assert ours == pytest.approx(BLEU().corpus_score(answers, [_REFERENCE]).score, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.5 km, OK?", ["it", "s", "3", "5", "km", "ok"]),
        ("Über Größe", ["über", "größe"]),
        ("Привет, мир", ["привет", "мир"]),
        ("我喜欢cats", ["我", "喜", "欢", "cats"]),
        ("snake_case", ["snake", "case"]),
    ],
)
def test_words_of_any_script_count(text: str, expected: list[str]) -> None:
    assert scores.split_words(text) == expected


def test_an_answer_in_another_script_can_be_right() -> None:
    texts = Texts(["привет мир"], ["hello"], ["привет мир"])
    assert _score("rougeL", "rouge", texts) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "overlap"),
    [
        ("Paris", "Paris", 1.0, 1.0),
        ("  Paris\n", "Paris", 1.0, 1.0),
        ("the Paris!", "paris", 0.0, 1.0),
        ("cafe\u0301", "caf\u00e9", 1.0, 0.0),
        ("in Paris", "Paris", 0.0, 2 / 3),
        ("", "Paris", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("the", "a", 0.0, 1.0),
        ("red red", "red", 0.0, 2 / 3),
    ],
)
def test_exact_match_is_strict_and_f1_is_squads(answer: str, reference: str, exact: float, overlap: float) -> None:
    assert scores.exact_match(answer, reference) == exact
    assert scores.f1(answer, reference) == pytest.approx(overlap)


def test_perplexity_weighs_rows_by_their_tokens() -> None:
    base, tuned = np.array([[20.0, 10.0], [2.0, 1.0]]), np.array([[10.0, 10.0], [1.0, 1.0]])
    score = scores.perplexity(base, tuned, 0)
    assert (score.base, score.tuned) == (pytest.approx(math.e**2), pytest.approx(math.e))
    assert (score.low, score.high) == (pytest.approx(math.e - math.e**2),) * 2
    assert score.verdict == "better"  # lower is


def test_equal_models_differ_by_nothing() -> None:
    for score in scores.scores(["rouge", "bleu", "exactMatch", "f1"], Texts(_REFERENCE, _BASE, _BASE), 0):
        assert (score.low, score.high, score.verdict) == (0.0, 0.0, "unclear")


def test_intervals_cover_the_true_difference_about_as_often_as_they_claim() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        base, tuned = draw.normal(0.3, 0.2, 60), draw.normal(0.4, 0.2, 60)
        parts = scores.Parts("x", *(np.stack([values, np.ones(60)], 1) for values in (base, tuned)), scores._mean)
        score = scores.with_interval(parts, int(draw.integers(1 << 30)))
        hits += score.low <= 0.1 <= score.high
    assert 85 <= hits <= 99


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    first, again, other = (scores.scores(["f1"], _TEXTS, seed)[0] for seed in (7, 7, 8))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_a_worse_result_is_called_worse() -> None:
    texts = Texts(_REFERENCE * 5, _TUNED * 5, _BASE * 5)
    assert {score.verdict for score in scores.scores(["rouge", "f1"], texts, 0)} == {"worse"}


def test_no_rows_give_no_scores() -> None:
    assert scores.scores(["rouge", "bleu"], Texts([], [], []), 0) == ()
