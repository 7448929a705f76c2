"""Chooses which strategy splits a run over its ranks, and how many tokens a rank computes at a
time, from memory estimates and free memory.

This module is pure. The choice changes speed and memory, never the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetune_api.messages.run import RunConfig
from finetune_api.spec.hardware import Offload, Strategy, StrategyOption
from finetune_trainer.parallel.estimate import mesh
from finetune_trainer.parallel.estimate.host_memory import gib
from finetune_trainer.parallel.estimate.recomputation import Recomputation, possible
from finetune_trainer.parallel.estimate.speed_estimate import seconds_per_token
from finetune_trainer.parallel.free_memory import (
    FreeMemory,
    Need,
    fits,
    fits_host,
    micro_batch_tokens,
    refusal,
    shortage,
    too_little_on_host,
)
from finetune_trainer.parallel.memory_estimate import MemoryEstimate, ParallelConfig, TrainingSetup, memory_estimate
from finetune_trainer.parallel.model_size import ModelSize

_LITTLE = 0.05  # of the memory needed: zero2 or offloading isn't considered if it saves less
_PAIRS: tuple[tuple[Strategy, Offload], ...] = (
    ("ddp", "none"),
    ("zero2", "none"),
    ("fsdp", "none"),
    ("zero2", "optimizer"),
    ("zero3", "optimizer"),
    ("zero3", "parameters"),
)
_QUANTIZED_PAIRS: tuple[tuple[Strategy, Offload], ...] = (("ddp", "none"), ("fsdp", "none"), ("fsdp", "parameters"))


@dataclass(frozen=True)
class UserChoice:
    """Holds what the user configured.

    `longest` is the number of tokens in the longest row, which `parts` ranks share. `tokens` is how
    many a rank computes at a time, if microBatchSize is a number. With `from_checkpoint`, strategy
    and offload are those of the checkpoint that the run resumes from. `mesh` is that checkpoint's:
    the copies of the model, and the ranks that share one; None unless it was trained with fsdp.
    """

    strategy: StrategyOption
    offload: Offload
    recompute: Literal["auto", "selective", "always", "never"]
    longest: int
    tokens: int | None = None
    from_checkpoint: bool = False
    mesh: tuple[int, int] | None = None
    parts: int = 1

    @property
    def min_tokens(self) -> int:
        """The fewest tokens that a rank can compute at a time."""
        return self.tokens or -(-self.longest // self.parts)


@dataclass(frozen=True)
class Choice:
    """Holds what was chosen.

    `reason` says why this strategy and no faster one was chosen; `table` is the estimate in words,
    for the log. `mesh_reason` says why every node has a copy of the model or not; it is empty
    unless fsdp runs on several nodes.
    """

    parallel: ParallelConfig
    reason: str
    tokens: int
    tokens_reason: str
    estimate: MemoryEstimate
    table: str
    mesh_reason: str = ""


def user_choice(run: RunConfig, longest: int) -> UserChoice:
    """Returns what a run's configuration says. `longest` is the number of tokens in the longest
    row."""
    micro_batch_size, parts = run.training.micro_batch_size, run.world.sequence_parallel_size
    rows = micro_batch_size * run.data.max_sequence_length if isinstance(micro_batch_size, int) else 0
    strategy, offload, recompute = run.world.strategy, run.world.offload, run.training.activation_checkpointing
    return UserChoice(strategy, offload, recompute, longest, -(-rows // parts) or None, parts=parts)


def training_setup(run: RunConfig, *, half: bool) -> TrainingSetup:
    """Returns what a run trains, and how. With `half`, matrix products are in bfloat16, and so is a
    frozen base."""
    full = run.method == "full"
    stored = 2 if half and not full else 4
    lora = run.lora
    reads_base = lora is not None and (lora.dora or lora.init != "default" or bool(lora.added_tokens))
    return TrainingSetup(
        run.world.size,
        run.training.optimizer,
        stored,
        half,
        full,
        run.model.quantization,
        reads_base,
        device=run.world.device,
        nodes=run.world.nodes,
        shards_checkpoints=run.checkpoint.shards != "never",
        shares_prefixes=run.data.packing and run.data.shared_prefix != "off",
        parts=run.world.sequence_parallel_size,
    )


@dataclass(frozen=True)
class _Option:
    """Holds a configuration and, if it fits, how fast it is with as many tokens at a time as fit.
    One that doesn't fit has the fewest permitted tokens."""

    need: Need
    fits: bool
    seconds: float

    @property
    def parallel(self) -> ParallelConfig:
        return self.need.parallel

    @property
    def preference(self) -> tuple[bool, float]:
        """What auto minimizes. Offloading is the last resort, since it depends on the host."""
        return self.parallel.offload != "none", self.seconds


def choose(choice: UserChoice, size: ModelSize, setup: TrainingSetup, free_memory: FreeMemory) -> Choice:
    """Returns the configuration that is estimated to be the fastest of those that fit. Nothing is
    offloaded if any configuration fits without.

    More memory never leads to a slower choice. Raises TooLittleMemory if auto finds none. A
    strategy that the user named is tried anyway, unless what doesn't depend on the number of tokens
    already needs more than is free, or the host's memory is too small.
    """
    options = [_option(choice, size, setup, config, free_memory) for config in candidates(choice, setup, free_memory)]
    if choice.strategy == "auto" and choice.offload == "none":
        options = [option for option in options if not _saves_little(option, options)]
    fitting = [option for option in options if option.fits]
    if fitting:
        best = min(fitting, key=lambda option: option.preference)
        reason = _auto_reason(choice, best, options, size, setup, free_memory)
        made = _choice(choice, best, reason, free_memory)
        return replace(made, mesh_reason=_mesh_reason(choice, best, options, setup, free_memory))
    last = options[-1]
    if choice.strategy != "auto" and last.need.estimate.fixed <= free_memory.free:
        if not fits_host(last.need.estimate, last.need.tokens, free_memory):
            raise too_little_on_host(last.need, free_memory)
        made = _choice(choice, last, "", free_memory)
        return replace(made, mesh_reason=_mesh_reason(choice, last, options, setup, free_memory))
    raise refusal([option.need for option in options], size, setup, free_memory)


def candidates(choice: UserChoice, setup: TrainingSetup, free_memory: FreeMemory) -> list[ParallelConfig]:
    """Returns the permitted configurations.

    On the CPU, auto offloads nothing unless the user asks for it, since device and host share the
    same memory.
    """
    recompute = possible(choice.recompute, free_memory.device)
    if choice.strategy != "auto":
        return _configs([(choice.strategy, choice.offload)], recompute, setup, choice.mesh)
    pairs = [pair for pair in (_PAIRS if setup.quantized == "none" else _QUANTIZED_PAIRS) if setup.supports(pair[0])]
    if choice.offload != "none":
        pairs = [pair for pair in pairs if pair[1] in (choice.offload, "parameters")]
    elif free_memory.device == "cpu":
        pairs = [pair for pair in pairs if pair[1] == "none"]
    if setup.ranks == 1:
        pairs = [pair for pair in pairs if pair[0] == "ddp" or pair[1] != "none"]
        if not setup.full and choice.offload == "none":  # adapters have few moments
            pairs = [pair for pair in pairs if pair[0] != "zero2"]
    return _configs(pairs, recompute, setup, choice.mesh)


def _configs(
    pairs: Sequence[tuple[Strategy, Offload]],
    recompute: tuple[Recomputation, ...],
    setup: TrainingSetup,
    saved: tuple[int, int] | None,
) -> list[ParallelConfig]:
    return [
        ParallelConfig(*pair, again.under(pair[0]), replicas)
        for again in recompute
        for pair in pairs
        for replicas in mesh.replica_counts(setup, *pair, saved)
    ]


def _option(
    choice: UserChoice, size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig, free_memory: FreeMemory
) -> _Option:
    estimate = memory_estimate(size, setup, parallel)
    tokens = choice.tokens or micro_batch_tokens(estimate, free_memory, choice.min_tokens)
    need = Need(parallel, estimate, tokens)
    seconds = seconds_per_token(size, setup, parallel, tokens, choice.longest)
    return _Option(need, fits(estimate, tokens, free_memory), seconds)


def _saves_little(option: _Option, options: list[_Option]) -> bool:
    """Returns whether offloading needs hardly less of the device than the leanest configuration
    without it, or zero2 hardly less than ddp."""
    parallel = option.parallel
    if parallel.offload == "none" and parallel.strategy != "zero2":
        return False
    tokens = min(other.need.tokens for other in options)
    simpler = [
        other.need.estimate.total(tokens)
        for other in options
        if other.parallel.offload == "none"
        and other.parallel.recompute == parallel.recompute
        and (parallel.offload != "none" or other.parallel.strategy == "ddp")
    ]
    return bool(simpler) and option.need.estimate.total(tokens) > (1 - _LITTLE) * min(simpler)


def _choice(choice: UserChoice, option: _Option, auto_reason: str, free_memory: FreeMemory) -> Choice:
    estimate, tokens = option.need.estimate, option.need.tokens
    reason = auto_reason
    if choice.strategy != "auto":
        reason = "the checkpoint was trained with it" if choice.from_checkpoint else "set by distribution.strategy"
    return Choice(
        parallel=option.parallel,
        reason=reason,
        tokens=tokens,
        tokens_reason="set by training.microBatchSize"
        if choice.tokens
        else f"each token needs about {estimate.per_token / 2**20:.2f} MiB, {free_memory} may be used, and the longest "
        f"row has {choice.longest} tokens{f', divided among {choice.parts} processes' if choice.parts > 1 else ''}",
        estimate=estimate,
        table=f"{estimate.table(tokens)}: {gib(estimate.total(tokens))} in total; {free_memory} may be used",
    )


def _mesh_reason(
    choice: UserChoice, best: _Option, options: list[_Option], setup: TrainingSetup, free_memory: FreeMemory
) -> str:
    """Returns why every node has a copy of the model, or why all ranks share one."""
    parallel = best.parallel
    if parallel.strategy != "fsdp" or setup.nodes == 1:
        return ""
    obstacle = mesh.obstacle(setup, parallel.offload)
    if obstacle:
        return obstacle
    alternatives = [option for option in options if replace(option.parallel, replicas=parallel.replicas) == parallel]
    if len(alternatives) == 1:
        return "the checkpoint was trained with it"
    if parallel.replicas > 1:
        return f"it fits within a node: {gib(best.need.total)} of {gib(free_memory.usable)}"
    copies = next(option for option in alternatives if option.parallel.replicas > 1)
    if not copies.fits:
        return shortage(copies.need, free_memory)
    return f"with {best.need.tokens} tokens at a time, it is estimated to be faster than {copies.parallel}"


def _auto_reason(
    choice: UserChoice,
    best: _Option,
    options: list[_Option],
    size: ModelSize,
    setup: TrainingSetup,
    free_memory: FreeMemory,
) -> str:
    """Returns why no faster configuration than `best` was chosen."""
    too_large = [
        replace(option, seconds=seconds_per_token(size, setup, option.parallel, best.need.tokens, choice.longest))
        for option in options
        if not option.fits
    ]
    faster = [option for option in too_large if option.preference < best.preference]
    if faster:
        return shortage(max(faster, key=lambda option: option.preference).need, free_memory)
    slower = next((option for option in options if option.fits), best)
    if slower is not best:
        tokens, fewer = best.need.tokens, slower.need.tokens
        return f"with {tokens} tokens at a time, it is estimated to be faster than {slower.parallel} with {fewer}"
    return f"it fits: {gib(best.need.total)} of {gib(free_memory.usable)}, and nothing is faster"
