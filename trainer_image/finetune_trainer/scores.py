"""Scores of generated answers and of losses, base model against result, with paired bootstrap intervals.

Called by `measure` on rank 0, once, at the end. Pure: texts and numbers in, scores out; random draws come from a seed.
ROUGE is rouge-score's, BLEU sacrebleu's; both are imported only where they are asked for.
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

from finetune_api.evaluation import Score

RESAMPLES = 1000
CONFIDENCE = 0.95
_ROUGE = ("rouge1", "rouge2", "rougeL")
# Languages written without spaces are compared character by character.
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Numbers = NDArray[np.float64]
Total = Callable[[Numbers], float]
"""Sums of some rows' parts → the score of those rows."""


@dataclass(frozen=True)
class Parts:
    """What each row adds to a score: a row of numbers whose sums make the score of any set of rows."""

    name: str
    base: Numbers
    tuned: Numbers
    total: Total
    better: Literal["higher", "lower"] = "higher"
    how: str = ""


@dataclass(frozen=True)
class Texts:
    """The same rows three times."""

    reference: Sequence[str]
    base: Sequence[str]
    tuned: Sequence[str]


def scores(metrics: Sequence[str], texts: Texts, seed: int) -> tuple[Score, ...]:
    """Of the metrics that evaluation.metrics names, in its order."""
    parts = [part for metric in metrics for part in _PARTS[metric](texts)] if texts.reference else []
    return tuple(with_interval(part, seed) for part in parts)


def perplexity(base: Numbers, tuned: Numbers, seed: int, *, pairs: bool = False) -> Score:
    """exp of the mean loss per token. (rows or blocks of rows, 2) each: the sum of losses, and how many they are.
    `pairs`: of the chosen answers."""
    what = "token of the chosen answers" if pairs else "learnt token"
    how = f"exp(mean loss per {what} of all test rows)"
    return with_interval(Parts("perplexity", base, tuned, _perplexity, "lower", how), seed)


def with_interval(parts: Parts, seed: int) -> Score:
    """Rows are drawn with replacement, the same ones for both models (Koehn 2004)."""
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


def words(text: str) -> list[str]:
    """As rouge-score's own tokenizer for ASCII; it would drop every other letter."""
    return _WORD.findall(text.lower())


def exact_match(answer: str, reference: str) -> float:
    """1 where they are the same but for white space and Unicode's ways of writing one letter."""
    return float(_plain(answer) == _plain(reference))


def f1(answer: str, reference: str) -> float:
    """Overlap of words without case, punctuation and articles, as SQuAD's evaluation has it."""
    ours, theirs = _squad(answer), _squad(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def _rouge(texts: Texts) -> list[Parts]:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(_ROUGE), tokenizer=_Words())
    how = "rouge-score, F-measure, no stemming, mean over rows"
    pairs = {
        model: [scorer.score(reference, answer) for reference, answer in zip(texts.reference, answers, strict=True)]
        for model, answers in (("base", texts.base), ("tuned", texts.tuned))
    }
    of = {
        (model, name): _ones([row[name].fmeasure for row in found]) for model, found in pairs.items() for name in _ROUGE
    }
    return [Parts(name, of["base", name], of["tuned", name], _mean, how=how) for name in _ROUGE]


def _bleu(texts: Texts) -> list[Parts]:
    from sacrebleu.metrics import BLEU

    sentence = BLEU(effective_order=True)

    def parts(answers: Sequence[str]) -> Numbers:
        found = [sentence.sentence_score(a, [r]) for a, r in zip(answers, texts.reference, strict=True)]
        return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found], np.float64)

    def total(sums: Numbers) -> float:
        whole = [round(value) for value in sums.tolist()]
        return float(BLEU.compute_bleu(whole[:4], whole[4:8], whole[8], whole[9], smooth_method="exp").score)

    corpus = BLEU()
    corpus.corpus_score([""], [[""]])  # a signature is known after a score
    return [Parts("bleu", parts(texts.base), parts(texts.tuned), total, how=f"sacrebleu {corpus.get_signature()}")]


def _each(name: str, score: Callable[[str, str], float], how: str) -> Callable[[Texts], list[Parts]]:
    def parts(texts: Texts) -> list[Parts]:
        base, tuned = (
            _ones([score(answer, reference) for answer, reference in zip(answers, texts.reference, strict=True)])
            for answers in (texts.base, texts.tuned)
        )
        return [Parts(name, base, tuned, _mean, how=how)]

    return parts


class _Words:
    """A tokenizer as rouge-score wants it."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _ones(values: list[float]) -> Numbers:
    """Each row's value, and a one to count it."""
    return np.array([[value, 1.0] for value in values], np.float64)


def _mean(sums: Numbers) -> float:
    return float(sums[0] / sums[1])


def _perplexity(sums: Numbers) -> float:
    return math.exp(min(float(sums[0] / sums[1]), 700.0))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _squad(text: str) -> list[str]:
    bare = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return re.findall(rf"[{_NO_SPACES}]|[^\s{_NO_SPACES}]+", bare)


_PARTS: dict[str, Callable[[Texts], list[Parts]]] = {
    "rouge": _rouge,
    "bleu": _bleu,
    "exactMatch": _each("exactMatch", exact_match, "share of answers that are the same but for white space"),
    "f1": _each("f1", f1, "words in common as in SQuAD's evaluation, mean over rows"),
}
