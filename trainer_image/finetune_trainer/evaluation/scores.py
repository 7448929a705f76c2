"""Scores generated answers and losses: compares the base model with the result, with paired
bootstrap intervals.

This module is pure: texts and numbers go in, and scores come out; random draws come from a seed.
ROUGE is computed by rouge-score and BLEU by sacrebleu; both are imported only if they are
requested.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune_api.messages.evaluation import Score

RESAMPLES = 1000
CONFIDENCE = 0.95
_ROUGE = ("rouge1", "rouge2", "rougeL")
# Languages written without spaces are compared character by character.
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Numbers = NDArray[np.float64]
"""What each row adds to a score, (rows, parts), or the sums over the rows, (parts,)."""

Total = Callable[[Numbers], float]
"""Computes the score of some rows from the sums of their parts."""


@dataclass(frozen=True)
class Parts:
    """Holds what each row adds to a score, for both models: numbers from whose sums `total`
    computes the score of any set of rows. `how` says in words how the score is computed."""

    name: str
    base: Numbers
    tuned: Numbers
    total: Total
    better: Literal["higher", "lower"] = "higher"
    how: str = ""


@dataclass(frozen=True)
class Texts:
    """Holds the answers for the same rows: the reference answers, and those of the base and of the
    tuned model."""

    reference: Sequence[str]
    base: Sequence[str]
    tuned: Sequence[str]


def scores(metrics: Sequence[str], texts: Texts, seed: int) -> tuple[Score, ...]:
    """Returns the scores of these metrics (evaluation.metrics), in their order. Without any rows,
    there are none."""
    parts = [part for metric in metrics for part in _PARTS[metric](texts)] if texts.reference else []
    return tuple(with_interval(part, seed) for part in parts)


def perplexity(base: Numbers, tuned: Numbers, seed: int, *, pairs: bool = False) -> Score:
    """Returns exp of the mean loss per token.

    `base` and `tuned` are (rows or groups of rows, 2): the sum of the losses, and the number of
    tokens. With `pairs`, they are those of the chosen answers.
    """
    tokens = "token of the chosen answers" if pairs else "supervised token"
    how = f"exp(mean loss per {tokens} of all test rows)"
    return with_interval(Parts("perplexity", base, tuned, _perplexity, "lower", how), seed)


def with_interval(parts: Parts, seed: int) -> Score:
    """Returns a score with the confidence interval of its difference between the models.

    Rows are drawn with replacement, the same ones for both models (Koehn 2004).
    """
    rows = len(parts.base)
    draw = np.random.default_rng(seed)
    differences = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = np.bincount(draw.integers(0, rows, rows), minlength=rows).astype(np.float64)
        differences[index] = parts.total(drawn @ parts.tuned) - parts.total(drawn @ parts.base)
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(
        name=parts.name,
        base=parts.total(parts.base.sum(0)),
        tuned=parts.total(parts.tuned.sum(0)),
        low=float(low),
        high=float(high),
        better=parts.better,
        rows=rows,
        how=parts.how,
    )


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case.

    For ASCII, it does what rouge-score's own tokenizer does, which drops all other letters.
    """
    return _WORD.findall(text.lower())


def exact_match(answer: str, reference: str) -> float:
    """Returns 1 if both texts are the same except for white space and for Unicode's ways of writing
    a letter, else 0."""
    return float(_normalized(answer) == _normalized(reference))


def f1(answer: str, reference: str) -> float:
    """Returns the F1 score of the words, ignoring case, punctuation and articles, as SQuAD's
    evaluation does."""
    answer_words, reference_words = _squad_words(answer), _squad_words(reference)
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    common = (Counter(answer_words) & Counter(reference_words)).total()
    return 2 * common / (len(answer_words) + len(reference_words))


def _rouge(texts: Texts) -> list[Parts]:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(_ROUGE), tokenizer=_Tokenizer())
    how = "rouge-score, F-measure, no stemming, mean over rows"
    results = {
        model: [scorer.score(reference, answer) for reference, answer in zip(texts.reference, answers, strict=True)]
        for model, answers in (("base", texts.base), ("tuned", texts.tuned))
    }
    parts = {
        (model, name): _counted([row[name].fmeasure for row in rows])
        for model, rows in results.items()
        for name in _ROUGE
    }
    return [Parts(name, parts["base", name], parts["tuned", name], _mean, how=how) for name in _ROUGE]


def _bleu(texts: Texts) -> list[Parts]:
    from sacrebleu.metrics import BLEU

    sentence = BLEU(effective_order=True)

    def parts(answers: Sequence[str]) -> Numbers:
        rows = [sentence.sentence_score(a, [r]) for a, r in zip(answers, texts.reference, strict=True)]
        return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows], np.float64)

    def total(sums: Numbers) -> float:
        counts = [round(value) for value in sums.tolist()]
        return float(BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score)

    corpus = BLEU()
    corpus.corpus_score([""], [[""]])  # the signature exists only once a score was computed
    return [Parts("bleu", parts(texts.base), parts(texts.tuned), total, how=f"sacrebleu {corpus.get_signature()}")]


def _mean_over_rows(name: str, score: Callable[[str, str], float], how: str) -> Callable[[Texts], list[Parts]]:
    """Returns a metric that is the mean of `score(answer, reference)` over the rows."""

    def parts(texts: Texts) -> list[Parts]:
        base, tuned = (
            _counted([score(answer, reference) for answer, reference in zip(answers, texts.reference, strict=True)])
            for answers in (texts.base, texts.tuned)
        )
        return [Parts(name, base, tuned, _mean, how=how)]

    return parts


class _Tokenizer:
    """Provides `split_words` with the interface that rouge-score expects of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def _counted(values: list[float]) -> Numbers:
    """Returns each row's value, followed by a one that counts the row, (rows, 2)."""
    return np.array([[value, 1.0] for value in values], np.float64)


def _mean(sums: Numbers) -> float:
    return float(sums[0] / sums[1])


def _perplexity(sums: Numbers) -> float:
    return math.exp(min(float(sums[0] / sums[1]), 700.0))


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _squad_words(text: str) -> list[str]:
    stripped = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return re.findall(rf"[{_NO_SPACES}]|[^\s{_NO_SPACES}]+", stripped)


_PARTS: dict[str, Callable[[Texts], list[Parts]]] = {
    "rouge": _rouge,
    "bleu": _bleu,
    "exactMatch": _mean_over_rows("exactMatch", exact_match, "share of equal answers, regardless of white space"),
    "f1": _mean_over_rows("f1", f1, "words in common as in SQuAD's evaluation, mean over rows"),
}
