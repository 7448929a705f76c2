"""What `strategy: auto` chooses for usual jobs on usual GPUs, and why: the answers of
`finetune plan` for them, from the sizes of published models. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_api.resource import LoraSpec
from finetune_trainer.parallel import model_size, strategy_choice
from finetune_trainer.parallel.estimate.host_memory import gib
from finetune_trainer.parallel.free_memory import FreeMemory
from finetune_trainer.parallel.memory_estimate import TrainingSetup
from finetune_trainer.parallel.strategy_choice import UserChoice
from sizing.models import MODELS, tensor_shapes

_LORA = LoraSpec(rank=16, target_modules=("all-linear",), dropout=0.05)
_METHODS = {"lora": "LoRA", "qlora": "QLoRA", "full": "full"}


@dataclass(frozen=True)
class Scenario:
    """Describes a job. `free` and `host` are the GiB that each process has of its GPU and of the
    host; the longest row has `longest` tokens."""

    hardware: str
    model: str
    method: Literal["lora", "qlora", "full"]
    ranks: int
    free: float
    host: float
    longest: int = 2048
    nodes: int = 1

    def row(self) -> str:
        """Returns a row of the table."""
        full = self.method == "full"
        published = next(model for model in MODELS if model.name == self.model)
        size = model_size.size_of(published.config, tensor_shapes(published), None if full else _LORA)
        quantized: Literal["none", "nf4"] = "nf4" if self.method == "qlora" else "none"
        setup = TrainingSetup(self.ranks, "adamw", 4 if full else 2, True, full, quantized, nodes=self.nodes)
        memory = FreeMemory("cuda", int(self.free * 2**30), int(self.host * 2**30))
        choice = strategy_choice.choose(UserChoice("auto", "none", "auto", self.longest), size, setup, memory)
        needed = f"{gib(choice.estimate.total(choice.tokens))} of {self.free} GiB"
        rows = f", rows of {self.longest:,}" if self.longest != 2048 else ""
        return (
            f"| {self.hardware} | {_METHODS[self.method]} {self.model}{rows} | {choice.parallel} | {choice.tokens:,} "
            f"| {needed} | {choice.reason} |"
        )


SCENARIOS = (
    Scenario("one RTX 4090", "Llama-3.1-8B", "lora", 1, 23.2, 60),
    Scenario("one RTX 4090", "Llama-3.1-8B", "qlora", 1, 23.2, 60),
    Scenario("one A10G, spot", "Llama-3.1-8B", "lora", 1, 21.9, 60),
    Scenario("four A10G", "Llama-3.1-8B", "qlora", 4, 21.9, 40, longest=16384),
    Scenario("one MIG slice of 40 GB", "Llama-3.1-8B", "lora", 1, 39.2, 60),
    Scenario("8 x H100", "Llama-3.1-8B", "lora", 8, 78.5, 120),
    Scenario("8 x H100", "Llama-3.1-8B", "lora", 8, 78.5, 120, longest=32768),
    Scenario("8 x H100", "Llama-3.2-3B", "full", 8, 78.5, 60),
    Scenario("8 x H100", "Llama-3.1-8B", "full", 8, 78.5, 120),
    Scenario("8 x H100", "Llama-3.1-70B", "qlora", 8, 78.5, 200),
    Scenario("4 x 8 H100", "Llama-3.1-8B", "full", 32, 78.5, 120, nodes=4),
    Scenario("4 x 8 H100", "Llama-3.1-70B", "full", 32, 78.5, 200, nodes=4),
)


def section(scenarios: tuple[Scenario, ...] = SCENARIOS) -> list[str]:
    """Returns the lines of the section on docs/gpu.md."""
    return [
        "## What auto chooses",
        "",
        "`finetune plan FILE --model DIR --gpu-memory SIZE` gives these answers. Rows have 2,048 tokens unless",
        "the table says otherwise; adapters have rank 16 on all linear layers. [sizing.md](sizing.md) has more",
        "models. Several MIG slices in a pod are refused, and a driver older than 580 is reported as",
        "GpuUnavailable.",
        "",
        "| GPUs | job | chosen | tokens at a time | memory | why nothing faster |",
        "| --- | --- | --- | --- | --- | --- |",
        *(scenario.row() for scenario in scenarios),
        "",
    ]
