"""The memory estimate is compared with the trainer's own step on fake tensors, on the branches of a
GPU and in the sizes of real models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from finetune_trainer.parallel import model_size
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING, NOTHING, SELECTIVE, Recomputation
from finetune_trainer.parallel.memory_estimate import ParallelConfig, TrainingSetup, memory_estimate
from finetune_trainer.parallel.model_size import ModelSize
from sizing.models import PublishedModel, tensor_shapes
from trainer.support.fake_step import Step, peak_bytes
from trainer.support.real_shapes import METHODS, MODELS

_MAX_ABOVE = 1.15
_MIN_BELOW = 0.95
_TOKENS = 8192
_QUARTER, _HALF = (Recomputation(share, keeps_attention=True) for share in (0.25, 0.5))


@dataclass(frozen=True)
class Case:
    """Describes what is measured. `strategy` is that of `ranks` ranks, of which `parts` share each
    row."""

    model: str
    method: str
    recompute: Recomputation = NOTHING
    strategy: Any = "ddp"
    ranks: int = 1
    parts: int = 1

    def __str__(self) -> str:
        again = f", {self.recompute}" if self.recompute else ""
        shared = f", {self.parts} share rows" if self.parts > 1 else ""
        return f"{self.model} {self.method} {self.strategy}{again}{shared}"


_CASES = (
    Case("1B", "q and v"),
    Case("1B", "all-linear", recompute=EVERYTHING),
    Case("1B", "full"),
    Case("1B", "full", recompute=EVERYTHING),
    Case("8B", "q and v"),
    Case("8B", "q and v", recompute=EVERYTHING),
    Case("8B", "all-linear"),
    Case("8B", "all-linear", recompute=EVERYTHING),
    Case("8B", "no dropout"),
    Case("8B", "q and v", recompute=SELECTIVE),
    Case("8B", "all-linear", recompute=_HALF),
    Case("8B", "no dropout", recompute=_QUARTER),
    Case("8B", "full", recompute=_HALF, strategy="fsdp", ranks=8),
    Case("8B", "full"),
    Case("8B", "full", recompute=EVERYTHING),
    Case("8B", "all-linear", strategy="zero2"),
    Case("8B", "full", strategy="zero2"),
    Case("8B", "all-linear", strategy="fsdp", ranks=8),
    Case("8B", "full", strategy="fsdp", ranks=8),
    Case("8B", "full", recompute=EVERYTHING, strategy="fsdp", ranks=8),
    Case("7B", "q and v"),
    Case("0.5B", "all-linear", recompute=SELECTIVE),
    Case("256k", "full"),
    Case("256k", "all-linear", recompute=EVERYTHING),
    Case("262k, untied", "full", recompute=EVERYTHING),
    Case("262k, untied", "q and v"),
    Case("8B", "high rank"),
    Case("8B", "trained embeddings"),
    Case("8B", "trained head"),
    Case("8B", "trained head and embeddings", recompute=EVERYTHING),
    Case("8B", "no dropout", ranks=16, parts=16),
    Case("8B", "q and v", recompute=SELECTIVE, ranks=4, parts=4),
    Case("8B", "full", strategy="fsdp", ranks=8, parts=8),
)


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_the_estimate_is_at_most_15_percent_above_what_a_step_needs(case: Case) -> None:
    """Weights and optimizer state are left out on both sides."""
    measured = peak_bytes(_step(case), MODELS[case.model]["num_hidden_layers"])
    assert _MIN_BELOW <= _estimated(case) / measured <= _MAX_ABOVE


@pytest.mark.parametrize(
    ("ranks", "recompute", "limit"),
    [
        (8, NOTHING, 42),
        (8, _HALF, 33),
        (8, SELECTIVE, 23),
        (8, EVERYTHING, 21),
        (32, EVERYTHING, 13),
        (64, EVERYTHING, 12),
    ],
    ids=str,
)
def test_full_training_of_8b_in_shards_stays_within_a_gpu(ranks: int, recompute: Recomputation, limit: int) -> None:
    """The limits are in GiB, with micro-batches of 5,120 tokens. They include weights, moments and
    the shard of the gradients that the first micro-batch of a step leaves (3.7 GiB on 8 ranks)."""
    case = Case("8B", "full", recompute=recompute, strategy="fsdp", ranks=ranks)
    peak = peak_bytes(replace(_step(case), tokens=5120), MODELS["8B"]["num_hidden_layers"])
    trained = _size(case).trained
    assert (peak + trained * (4 + 8) // ranks) / 2**30 <= limit


def _step(case: Case) -> Step:
    return Step(
        shape=tuple(MODELS[case.model].items()),
        lora=METHODS[case.method],
        recompute=case.recompute,
        tokens=_TOKENS,
        ranks=case.ranks if case.strategy == "fsdp" else None,
        parts=case.parts,
    )


def _estimated(case: Case) -> int:
    """Returns the estimate without what exists between steps."""
    full = case.method == "full"
    setup = TrainingSetup(case.ranks, "adamw", 4 if full else 2, True, full, parts=case.parts)
    size = _size(case)
    estimate = memory_estimate(size, setup, ParallelConfig(case.strategy, recompute=case.recompute))
    stored = (size.parameters - size.trained) * setup.stored + size.trained * 4
    shards = 1 if case.strategy == "ddp" else case.ranks
    return estimate.total(_TOKENS) - stored // shards - estimate.optimizer


def _size(case: Case) -> ModelSize:
    model = PublishedModel(case.model, MODELS[case.model])
    return model_size.size_of(model.config, tensor_shapes(model), METHODS[case.method])
