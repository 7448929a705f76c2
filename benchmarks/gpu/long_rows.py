"""Estimates the longest row that fits on a GPU, if some processes share each row. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_api.resource import LoraSpec
from finetune_api.spec.hardware import Strategy
from finetune_trainer.parallel import model_size
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING, NOTHING, SELECTIVE, Recomputation
from finetune_trainer.parallel.free_memory import FreeMemory
from finetune_trainer.parallel.memory_estimate import ParallelConfig, TrainingSetup, memory_estimate
from sizing.models import MODELS, tensor_shapes

_LORA = LoraSpec(rank=16, target_modules=("all-linear",), dropout=0.05)
_MEMORY = FreeMemory("cuda", int(78.5 * 2**30), 120 * 2**30)
_RANKS = 8
SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Run:
    """Describes how an 8B model is trained on 8 GPUs with 80 GB."""

    method: Literal["LoRA", "full"]
    strategy: Strategy
    recompute: Recomputation

    def longest(self, parts: int) -> int:
        """Returns the tokens of the longest row that fits if `parts` processes share each row."""
        full = self.method == "full"
        model = next(model for model in MODELS if model.name == "Llama-3.1-8B")
        size = model_size.size_of(model.config, tensor_shapes(model), None if full else _LORA)
        setup = TrainingSetup(_RANKS, "adamw", 4 if full else 2, True, full, parts=parts)
        estimate = memory_estimate(size, setup, ParallelConfig(self.strategy, recompute=self.recompute))
        return max(0, estimate.fitting_tokens(_MEMORY.usable)) * parts

    def row(self) -> str:
        """Returns a row of the table."""
        again = str(self.recompute) if self.recompute else "activations stored"
        lengths = " | ".join(f"{self.longest(parts):,}" for parts in SIZES)
        return f"| {self.method} | {self.strategy}, {again} | {lengths} |"


RUNS: tuple[Run, ...] = (
    Run("LoRA", "ddp", NOTHING),
    Run("LoRA", "ddp", SELECTIVE),
    Run("LoRA", "ddp", EVERYTHING),
    Run("full", "fsdp", NOTHING),
    Run("full", "fsdp", SELECTIVE),
    Run("full", "fsdp", EVERYTHING),
)


def section() -> list[str]:
    """Returns the lines of the section on docs/gpu.md."""
    return [
        "## The longest row that fits (an estimate)",
        "",
        f"Tokens of the longest row of Llama-3.1-8B on {_RANKS} GPUs with 80 GB, by the memory estimate, if N",
        "processes share each row (`distribution.sequenceParallelSize`,",
        "[decision 0054](decisions/0054-sequence-parallelism.md)). Adapters have rank 16 on all linear layers, with",
        "dropout. No GPU has computed such a row; the model itself was trained on 131,072 positions.",
        "",
        f"| | strategy | {' | '.join(f'N = {parts}' for parts in SIZES)} |",
        f"| --- | --- |{' --- |' * len(SIZES)}",
        *(run.row() for run in RUNS),
        "",
    ]
