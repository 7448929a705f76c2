"""Compares memory estimates with the memory that is free, and reports which memory is short.

This module is pure and doesn't import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from finetune_trainer.parallel.estimate.host_memory import HostMemory, gib
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING
from finetune_trainer.parallel.memory_estimate import MemoryEstimate, ParallelConfig, TrainingSetup, memory_estimate
from finetune_trainer.parallel.model_size import ModelSize

# Beyond a few hundred tokens, matrix products on a CPU hardly get faster while memory use grows. A
# GPU needs thousands of tokens.
_MAX_USEFUL_TOKENS = {"cpu": 768, "cuda": 16384}
_USABLE = 0.85  # of free memory: the estimate ignores fragmentation and libraries
_MAX_RANKS = 1024
MAX_PARTS = 64
"""The most ranks that may share a row: the limit of distribution.sequenceParallelSize."""
_GIB = 2**30


@dataclass(frozen=True)
class FreeMemory:
    """Holds the free bytes of one rank: of its device and, if that is a GPU, its share of the
    host's memory too."""

    device: Literal["cpu", "cuda"]
    free: int
    host: int

    @property
    def usable(self) -> int:
        """The bytes of the device that an estimate may add up to."""
        return int(self.free * _USABLE)

    def __str__(self) -> str:
        return f"{gib(self.usable)} of {gib(self.free)} free"


@dataclass(frozen=True)
class Need:
    """Holds what a configuration needs to compute `tokens` tokens at a time."""

    parallel: ParallelConfig
    estimate: MemoryEstimate
    tokens: int

    @property
    def total(self) -> int:
        """The bytes of the device."""
        return self.estimate.total(self.tokens)

    def host(self, free_memory: FreeMemory) -> HostMemory:
        """What a pod needs of the host's memory."""
        return host_memory(self.estimate, self.tokens, free_memory.device)


class TooLittleMemory(ValueError):
    """Signals that no permitted configuration fits. `field` is the field of the job to change, and
    the message has figures and a remedy."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def host_memory(estimate: MemoryEstimate, tokens: int, device: str) -> HostMemory:
    """Returns what a pod needs of the host's memory in each phase if `tokens` tokens are computed
    at a time. On CPUs, that includes what the ranks themselves need."""
    host = estimate.host
    if device == "cuda":
        return host
    resident = host.ranks * (estimate.weights + estimate.optimizer)
    training = host.ranks * estimate.total(tokens) + host.training
    return replace(host, training=training, saving=resident + host.saving)


def fits_host(estimate: MemoryEstimate, tokens: int, free_memory: FreeMemory) -> bool:
    """Returns whether the host's memory suffices from loading to saving."""
    return host_memory(estimate, tokens, free_memory.device).per_rank <= free_memory.host


def fits(estimate: MemoryEstimate, tokens: int, free_memory: FreeMemory) -> bool:
    """Returns whether `tokens` tokens at a time fit into the device's memory, and the whole run
    into the host's."""
    return estimate.total(tokens) <= free_memory.usable and fits_host(estimate, tokens, free_memory)


def micro_batch_tokens(estimate: MemoryEstimate, free_memory: FreeMemory, longest: int) -> int:
    """Returns how many tokens a rank computes at a time: as many as fit and make computing faster,
    but at least the `longest` tokens that it has of the longest row."""
    usable = free_memory.usable
    if free_memory.device == "cpu":  # copies for checkpoints are in the same memory
        usable = min(usable, free_memory.host - estimate.host.training // estimate.host.ranks)
    fitting = estimate.fitting_tokens(usable)
    return max(longest, min(_MAX_USEFUL_TOKENS[free_memory.device], fitting))


def shortage(need: Need, free_memory: FreeMemory) -> str:
    """Returns, for a configuration that doesn't fit, what it needs and what is free."""
    if need.total > free_memory.usable:
        return f"{need.parallel} needs {gib(need.total)}, and {free_memory} may be used"
    return f"{_host_shortage(need, free_memory)}; raise resources.memory to use it"


def refusal(needs: list[Need], size: ModelSize, setup: TrainingSetup, free_memory: FreeMemory) -> TooLittleMemory:
    """Returns the error for `needs`, of which none fits.

    It names the host's memory if that is all that one of them lacks, and otherwise the device's.
    """
    on_device = [need for need in needs if need.total <= free_memory.usable]
    if not on_device:
        return _too_little_on_device(min(needs, key=lambda need: need.total), size, setup, free_memory)
    need = min(on_device, key=lambda need: need.host(free_memory).peak)
    return too_little_on_host(need, free_memory, _more_ranks(need.tokens, size, setup, free_memory))


def too_little_on_host(need: Need, free_memory: FreeMemory, alternative: str = "") -> TooLittleMemory:
    """Returns the error for a configuration that lacks only the host's memory. `alternative` is
    another remedy as a sentence."""
    host = need.host(free_memory)
    missing = host.peak - free_memory.host * host.ranks
    enough = "the GPUs suffice" if free_memory.device == "cuda" else "each process would have enough"
    return TooLittleMemory(
        "resources.memory",
        f"{enough}, but the host's memory doesn't suffice: {_host_shortage(need, free_memory)}. Raise "
        f"resources.memory by at least {math.ceil(missing / _GIB)}Gi. {alternative}".rstrip(),
    )


def _host_shortage(need: Need, free_memory: FreeMemory) -> str:
    host = need.host(free_memory)
    return (
        f"{need.parallel} needs {gib(host.peak)} of host memory in a pod {host.purpose}, and "
        f"{gib(free_memory.host * host.ranks)} are free"
    )


def _too_little_on_device(
    need: Need, size: ModelSize, setup: TrainingSetup, free_memory: FreeMemory
) -> TooLittleMemory:
    """Returns the error for a device that is too small even for the configuration that needs the
    least."""
    more = _shared_rows(need, size, setup, free_memory) or _more_ranks(need.tokens, size, setup, free_memory)
    device = "GPU memory" if free_memory.device == "cuda" else "memory"
    adapters = "method lora, " if setup.full else ""
    return TooLittleMemory(
        "distribution.strategy",
        f"the model doesn't fit: even {need.parallel} needs {need.estimate.table(need.tokens)}, "
        f"{gib(need.total)} of {device} in total for each of {setup.ranks} processes, but only "
        f"{free_memory} may be used. {f'{more} ' if more else ''}Use {adapters}more processes, "
        f"more {device} for each, or a smaller dataset.maxSequenceLength (micro-batches have at least {need.tokens} "
        "tokens)",
    )


def _shared_rows(need: Need, size: ModelSize, setup: TrainingSetup, free_memory: FreeMemory) -> str:
    """Returns, as a sentence, how few of the ranks would have to share each row for it to fit;
    nothing if that isn't enough, or if the ranks or the heads can't be divided."""
    row = need.tokens * setup.parts
    for parts in range(setup.parts + 1, min(setup.ranks, MAX_PARTS) + 1):
        if setup.ranks % parts or not size.heads or size.heads % parts:
            continue
        shared, tokens = replace(setup, parts=parts), -(-row // parts)
        for parallel in (need.parallel, ParallelConfig("fsdp", recompute=EVERYTHING)):
            estimate = memory_estimate(size, shared, replace(parallel, recompute=EVERYTHING))
            if setup.supports(parallel.strategy) and fits(estimate, tokens, free_memory):
                offload = f" with offload {parallel.offload}" if parallel.offload != "none" else ""
                return (
                    f"With distribution.sequenceParallelSize {parts}, as many processes share each row, and strategy "
                    f"{parallel.strategy}{offload} would do."
                )
    return ""


def _more_ranks(tokens: int, size: ModelSize, setup: TrainingSetup, free_memory: FreeMemory) -> str:
    """Returns, as a sentence, how many ranks would be enough with fsdp, determined by repeated
    doubling; nothing if _MAX_RANKS aren't enough, or if fsdp can't train the setup."""
    ranks, nodes = 2 * setup.ranks, 2 * setup.nodes
    while ranks <= _MAX_RANKS and setup.supports("fsdp"):
        larger = replace(setup, ranks=ranks, nodes=nodes)
        if fits(memory_estimate(size, larger, ParallelConfig("fsdp", recompute=EVERYTHING)), tokens, free_memory):
            return f"{ranks} processes of this size with strategy fsdp would do."
        ranks, nodes = 2 * ranks, 2 * nodes
    return ""
