"""The memory estimate of zero2 and zero3 is compared with DeepSpeed's own engine on fake tensors,
on the branches of a GPU, with layers and vocabularies of real models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from finetune_trainer.parallel import model_size
from finetune_trainer.parallel.deepspeed_config import Stage
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING, NOTHING, Recomputation
from finetune_trainer.parallel.memory_estimate import ParallelConfig, TrainingSetup, memory_estimate
from sizing.models import PublishedModel, tensor_shapes
from trainer.support import fake_zero, forked_ranks
from trainer.support.fake_step import Step
from trainer.support.fake_zero import ZeroStep
from trainer.support.real_shapes import METHODS, MODELS

_RANKS, _TOKENS = 8, 8192
_MAX_ABOVE, _MIN_BELOW = 1.15, 0.95


@dataclass(frozen=True)
class Case:
    """Describes what is measured: a few layers of a model, in a stage of ZeRO."""

    stage: Stage
    model: Literal["1B", "8B"]
    layers: int
    method: str
    recompute: Recomputation = NOTHING

    def __str__(self) -> str:
        again = f", {self.recompute}" if self.recompute else ""
        return f"zero{self.stage}, {self.layers} layers of {self.model}, {self.method}{again}"

    @property
    def shape(self) -> PublishedModel:
        return PublishedModel(self.model, {**MODELS[self.model], "num_hidden_layers": self.layers})

    @property
    def step(self) -> ZeroStep:
        shape = tuple(self.shape.config.items())
        return ZeroStep(Step(shape, METHODS[self.method], self.recompute, _TOKENS), self.stage, _RANKS)

    @property
    def estimated(self) -> int:
        """The estimate with everything that exists between steps."""
        lora = METHODS[self.method]
        size = model_size.size_of(self.shape.config, tensor_shapes(self.shape), lora)
        setup = TrainingSetup(_RANKS, "adamw", 2 if lora else 4, True, lora is None)
        parallel = ParallelConfig("zero2" if self.stage == 2 else "zero3", recompute=self.recompute)
        return memory_estimate(size, setup, parallel).total(_TOKENS)


_CASES = (
    Case(2, "1B", 4, "full"),
    Case(3, "1B", 4, "full"),
    Case(2, "1B", 4, "all-linear"),
    Case(3, "1B", 4, "all-linear"),
    Case(2, "1B", 4, "full", EVERYTHING),
    Case(3, "1B", 4, "full", EVERYTHING),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, int]:
    """The peak of each case, each in a process of its own, two at a time."""
    folder = tmp_path_factory.mktemp("peaks")
    files = {case: folder / str(number) for number, case in enumerate(_CASES)}
    for number in range(0, len(_CASES), 2):
        pair = [(case.step, files[case]) for case in _CASES[number : number + 2]]
        forked_ranks.exit_codes_in_forks(fake_zero.write_peak, pair)
    return {case: _read(path) for case, path in files.items()}


def _read(path: Path) -> int:
    return int(path.read_text()) if path.is_file() else 0


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_the_estimate_is_at_most_15_percent_above_what_deepspeed_needs(case: Case, measured: dict[Case, int]) -> None:
    assert measured[case], "the engine failed"
    assert _MIN_BELOW <= case.estimated / measured[case] <= _MAX_ABOVE
