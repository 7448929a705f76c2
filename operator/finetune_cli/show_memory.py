"""Shows the memory per process with each strategy, for `finetune plan --model DIR`.

It reads only the headers of the model's files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune_api.messages.run import RunConfig
from finetune_trainer.parallel import model_size, strategy_choice
from finetune_trainer.parallel.estimate import mesh
from finetune_trainer.parallel.estimate.host_memory import gib
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING, SELECTIVE
from finetune_trainer.parallel.free_memory import FreeMemory, TooLittleMemory, host_memory
from finetune_trainer.parallel.memory_estimate import MemoryEstimate, ParallelConfig, TrainingSetup, memory_estimate

_PARALLEL_CONFIGS = (
    ParallelConfig("ddp"),
    ParallelConfig("zero2"),
    ParallelConfig("fsdp"),
    ParallelConfig("fsdp", recompute=SELECTIVE),
    ParallelConfig("fsdp", recompute=EVERYTHING),
    ParallelConfig("fsdp", "parameters", recompute=EVERYTHING),
    ParallelConfig("zero3", "parameters", recompute=EVERYTHING),
)


def available_memory(config: RunConfig, gpu_memory: int | None) -> FreeMemory | None:
    """Returns the memory of one process in bytes; None for a GPU if `gpu_memory` is None."""
    host = (config.memory_bytes or 0) // config.world.processes_per_node
    if config.world.device == "cpu":
        return FreeMemory("cpu", host, host)
    return None if gpu_memory is None else FreeMemory("cuda", gpu_memory, host)


def lines(config: RunConfig, folder: Path, free_memory: FreeMemory | None) -> list[str]:
    """Returns text: the memory needed with each strategy, and the one that would be chosen.

    Raises RunError if the folder can't be read as a model.
    """
    size = model_size.read(folder, config.lora if config.method == "lora" else None, config.full)
    half = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and config.world.device == "cuda")
    user_choice = strategy_choice.user_choice(config, config.data.max_sequence_length)
    setup = strategy_choice.training_setup(config, half=half)
    tokens = user_choice.min_tokens
    table = [
        f"memory per process, with micro-batches of {tokens} tokens{_share(setup)} and matrix products in "
        f"{'bfloat16' if half else 'float32'}: {size.parameters:,} parameters, {size.trained:,} trained"
    ]
    table += [
        _line(parallel, memory_estimate(size, setup, parallel), tokens, setup.device)
        for parallel in _parallel_configs(setup)
        if setup.supports(parallel.strategy)
    ]
    if half and setup.device == "cuda":
        table.append(
            "  bfloat16 needs a GPU of Ampere or newer (A10, A100, L4, L40S, H100, RTX 30 and later); an older one "
            "(V100, T4) computes in float32 with model.dtype auto, and weights that aren't quantized take twice as much"
        )
    if free_memory is None:
        return [*table, "  strategy auto uses the fastest one that fits; give the memory of one GPU with --gpu-memory"]
    try:
        choice = strategy_choice.choose(user_choice, size, setup, free_memory)
    except TooLittleMemory as error:
        return [*table, f"  {error.field}: {error}"]
    table.append(
        f"  chosen: {choice.parallel} ({choice.reason}); micro-batches of {choice.tokens} tokens{_share(setup)}"
    )
    if choice.mesh_reason:
        replicas = choice.parallel.replicas
        copies = "a copy of the model on each node" if replicas > 1 else "one copy of the model over all nodes"
        table.append(f"  mesh: {replicas} x {setup.ranks // replicas}, {copies} ({choice.mesh_reason})")
    return table


def _share(setup: TrainingSetup) -> str:
    """Says how many processes share each row, if several do."""
    return f" of rows that {setup.parts} processes share" if setup.parts > 1 else ""


def _parallel_configs(setup: TrainingSetup) -> list[ParallelConfig]:
    """Returns the configurations to show: fsdp also within each node, if there are several."""
    return [
        replace(parallel, replicas=replicas)
        for parallel in _PARALLEL_CONFIGS
        for replicas in sorted(mesh.replica_counts(setup, parallel.strategy, parallel.offload))
    ]


def _line(parallel: ParallelConfig, estimate: MemoryEstimate, tokens: int, device: str) -> str:
    """Formats a configuration's need."""
    host = f"host memory of a pod: {host_memory(estimate, tokens, device)}"
    return f"  {parallel!s:<52} {gib(estimate.total(tokens)):>11} ({estimate.table(tokens)}; {host})"
