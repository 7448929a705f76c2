"""Defines what a checkpoint holds besides tensors: how far training has come, and what happened.
This module is pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import Field

from finetune_api.base import LenientModel
from finetune_api.messages.events import SkipReason
from finetune_api.spec.hardware import Offload, Strategy


class Skipped(LenientModel):
    """Records that steps `first` to `last` changed nothing. `rows` are line numbers of
    dataset.uri."""

    first: int
    last: int
    reason: SkipReason
    rows: tuple[int, ...] = Field(default=(), description="Empty after a spike: all rows of these steps.")

    @property
    def steps(self) -> int:
        """The number of skipped steps."""
        return self.last - self.first + 1


def skipped_steps(skipped: Sequence[Skipped], reason: SkipReason | None = None) -> int:
    """Returns how many steps changed nothing, for this reason or for any."""
    return sum(entry.steps for entry in skipped if reason in (None, entry.reason))


@dataclass(frozen=True)
class Best:
    """Holds the lowest eval loss, its step, and the number of evaluations since then."""

    step: int
    loss: float
    worse_since: int = 0


class BestState(LenientModel):
    """Represents `Best` as a checkpoint stores it."""

    step: int
    loss: float
    worse_since: int


class CheckpointState(LenientModel):
    """Holds everything that isn't a tensor.

    There is no random state, since every draw is a function of seed, step and rank.
    """

    step: int = 0
    data_key: str = Field(default="", description="Identifies the rows from which the plan was made.")
    date: str | None = Field(default=None, description="The day that the chat template writes; None if it has none.")
    dtype: str = ""
    micro_tokens: int = Field(default=0, description="Tokens that a rank computed at a time, before any halving.")
    halvings: int = Field(default=0, description="How often micro-batches were halved because memory ran out.")
    strategy: Literal["", Strategy] = ""
    offload: Offload = "none"
    mesh: tuple[int, int] | None = Field(
        default=None, description="Of fsdp: copies of the model, and ranks that share one. None means a single copy."
    )
    skipped: tuple[Skipped, ...] = Field(default=(), description="Steps that changed nothing, in order.")
    losses: tuple[float, ...] = Field(default=(), description="The latest losses, in which spikes are detected.")
    compiled: bool | None = None
    best: BestState | None = None
    eval_due: bool = Field(default=False, description="Whether the evaluation after this step is still to be done.")
    stopped_early: bool = False
    test_loss_before: float | None = None
    test_parts_before: tuple[tuple[float, float], ...] = Field(
        default=(), description="Loss and label count of each test row, or of groups of rows if there are many."
    )
    answers_before: tuple[str, ...] = ()
    unfinished_before: int = 0

    @property
    def updates(self) -> int:
        """The number of steps that updated the weights."""
        return self.step - skipped_steps(self.skipped)

    def result_step(self, *, keep_best: bool) -> int:
        """Returns the step whose weights are the result."""
        return self.best.step if keep_best and self.best else self.step

    @property
    def best_so_far(self) -> Best | None:
        """The lowest eval loss so far, or None before the first evaluation."""
        return Best(self.best.step, self.best.loss, self.best.worse_since) if self.best else None

    def with_best(self, best: Best) -> CheckpointState:
        """Returns a copy with `best` as the lowest eval loss."""
        return self.model_copy(update={"best": BestState(**asdict(best))})
