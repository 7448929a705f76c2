"""Defines Evaluation, the content of finetune/evaluation.json in the output."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.base import LenientModel
from finetune_api.status import ScoreStatus


class Score(LenientModel):
    """Compares the base model and the result by one score on the same rows.

    `low` and `high` are the ends of a paired bootstrap interval of the difference tuned - base.
    """

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
        """The score of the result minus that of the base model."""
        return self.tuned - self.base

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """Whether the result is better or worse; unclear if the interval contains 0."""
        if self.low <= 0.0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0.0) == (self.better == "higher") else "worse"

    @property
    def status(self) -> ScoreStatus:
        """The score as status.evaluation has it, with 4 decimals."""
        base, tuned, low, high = (round(value, 4) for value in (self.base, self.tuned, self.low, self.high))
        return ScoreStatus(name=self.name, base=base, tuned=tuned, low=low, high=high)


class Evaluation(LenientModel):
    """Contains all scores, and how they were computed."""

    step: int = Field(default=0, description="Optimizer step of the weights that were scored.")
    scores: tuple[Score, ...] = ()
    answered: int = Field(default=0, description="Number of test rows that were answered.")
    unfinished_base: int = Field(default=0, description="Answers of the base model that maxNewTokens cut off.")
    unfinished_tuned: int = Field(default=0, description="Answers of the result that maxNewTokens cut off.")
    max_new_tokens: int = 0
    confidence: float = 0.95
    resamples: int = 0
    seed: int = 0
