"""Evaluation: what finetune/evaluation.json holds. Computed by rank 0, carried by an event, read by status, report and
trackers. Pure.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.model import LenientModel
from finetune_api.status import ScoreStatus


class Score(LenientModel):
    """One score of base model and result on the same rows, and a paired bootstrap interval of their difference."""

    name: str = Field(description="rouge1, rouge2, rougeL, bleu, exactMatch, f1 or perplexity.")
    base: float
    tuned: float
    low: float = Field(description="Lower end of the interval of tuned - base.")
    high: float = Field(description="Upper end.")
    better: Literal["higher", "lower"] = "higher"
    rows: int
    how: str = Field(default="", description="What exactly was computed, e.g. sacrebleu's signature.")

    @property
    def difference(self) -> float:
        return self.tuned - self.base

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """unclear: the interval holds 0."""
        if self.low <= 0.0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0.0) == (self.better == "higher") else "worse"

    @property
    def short(self) -> ScoreStatus:
        """As status shows it."""
        base, tuned, low, high = (round(value, 4) for value in (self.base, self.tuned, self.low, self.high))
        return ScoreStatus(name=self.name, base=base, tuned=tuned, low=low, high=high)


class Evaluation(LenientModel):
    """All scores, and how they came about."""

    step: int = Field(default=0, description="Optimizer step of the weights that were scored.")
    scores: tuple[Score, ...] = ()
    answered: int = Field(default=0, description="Test rows that were answered.")
    unfinished_base: int = Field(default=0, description="Base model's answers that maxNewTokens cut off.")
    unfinished_tuned: int = Field(default=0, description="The result's answers that maxNewTokens cut off.")
    max_new_tokens: int = 0
    confidence: float = 0.95
    resamples: int = 0
    seed: int = 0
