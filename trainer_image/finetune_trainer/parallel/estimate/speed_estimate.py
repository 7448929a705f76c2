"""Estimates how long a rank needs for a token, to order configurations by speed.

This module is pure. Only ratios matter: the rates are rough values of one kind of hardware per
device, and none of them was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_trainer.data.batching.sequence_part import key_copies
from finetune_trainer.parallel.memory_estimate import QUANTIZED_BYTES, ParallelConfig, TrainingSetup
from finetune_trainer.parallel.model_size import ModelSize

_GRADIENT_BYTES = 4  # per trained weight that is sent in float32
_ROUNDED_GRADIENT_BYTES = 2  # in bfloat16, in full training with ddp on GPUs
_OPTIMIZER_BYTES = 8  # per trained weight of a rank: its gradient to the host, and the weight back
_MICRO_BATCHES = 4  # of a step, over which what happens once per step is spread


@dataclass(frozen=True)
class _Rates:
    """Holds what a device does per second: floating-point operations, bytes read from its memory,
    bytes exchanged with the ranks of the same node and of others, and bytes exchanged with the
    host. `launches` is the number of seconds that a layer's operations take at least."""

    operations: float
    memory: float
    same_node: float
    other_nodes: float
    host: float
    optimizer: float  # weights that the host's processor updates
    launches: float


_RATES = {
    "cuda": _Rates(300e12, 2e12, 100e9, 10e9, 20e9, 1e9, 1e-3),
    "cpu": _Rates(200e9, 20e9, 5e9, 1e9, 20e9, 1e9, 1e-4),
}


def seconds_per_token(
    size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig, tokens: int, longest: int = 0
) -> float:
    """Returns how long a rank needs for a token if it computes `tokens` tokens at a time.

    Attention is counted only if it is recomputed on a GPU, for rows of `longest` tokens, since
    everything else computes it equally often. On GPUs, fsdp and zero3 send while they compute;
    zero2, as it is configured here, sends in between.
    """
    rates = _RATES[setup.device]
    again = parallel.recompute
    passes = (3 if setup.full else 2) + again.share  # a forward pass is one
    operations = 2 * size.parameters * passes * tokens / rates.operations
    if setup.device == "cuda" and not again.keeps_attention:
        queries = size.layer.queries if size.layer else size.hidden
        operations += again.layers(size.layers) * 2 * longest * queries * tokens / rates.operations
    reading = _base_bytes(size, setup, setup.stored) * passes / rates.memory
    computing = max(operations + reading, size.layers * rates.launches * passes / 2)
    sending = _sending_seconds(size, setup, parallel, rates)
    if parallel.strategy in ("fsdp", "zero3") and setup.device == "cuda":
        seconds = max(computing, sending) + min(computing, sending) / 4
    else:
        seconds = computing + sending
    seconds += _exchange_seconds(size, setup, parallel, rates) * tokens
    return (seconds + _host_seconds(size, setup, parallel, rates)) / tokens


def _sending_seconds(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig, rates: _Rates) -> float:
    """Returns the seconds of a micro-batch in which a rank sends. If every node has a copy of the
    model, a shard of the gradients is sent to the other nodes, twice, once per step."""
    if parallel.replicas == 1:
        return _sent_bytes(size, setup, parallel) / (rates.same_node if setup.nodes == 1 else rates.other_nodes)
    shards = setup.ranks // parallel.replicas
    gradients = size.trained * _GRADIENT_BYTES / shards * 2 / _MICRO_BATCHES
    between = (parallel.replicas - 1) / parallel.replicas * gradients / rates.other_nodes
    return _sent_bytes(size, replace(setup, ranks=shards, nodes=1), parallel) / rates.same_node + between


def _exchange_seconds(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig, rates: _Rates) -> float:
    """Returns the seconds in which a rank exchanges heads for a token, in the forward pass, in the
    backward pass, and wherever they are recomputed, if ranks share each row. It waits for them."""
    if setup.parts == 1:
        return 0.0
    queries, keys = (size.layer.queries, size.layer.keys) if size.layer else (size.hidden, size.hidden)
    keys *= key_copies(max(1, size.kv_heads), setup.parts)
    values = (2 * queries + 2 * keys) * size.layers * (2 + parallel.recompute.share)
    others = (setup.parts - 1) / setup.parts
    rate = rates.same_node if setup.parts <= setup.ranks_per_node else rates.other_nodes
    return values * (2 if setup.half else 4) * others / rate


def _sent_bytes(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig) -> float:
    """Returns the bytes that a rank sends in a micro-batch: gradients, and gathered weights for the
    forward pass and for the backward pass. ddp sends gradients once per step, and all of them
    twice."""
    others = (setup.ranks - 1) / setup.ranks
    gradients: float = size.trained * _GRADIENT_BYTES
    if parallel.strategy == "ddp":
        rounded = setup.full and setup.half and setup.device == "cuda"
        gradients = size.trained * (_ROUNDED_GRADIENT_BYTES if rounded else _GRADIENT_BYTES) * 2 / _MICRO_BATCHES
    stored = 2 if setup.half and parallel.strategy == "fsdp" else setup.stored
    weights = 2 * _base_bytes(size, setup, stored) if parallel.strategy in ("zero3", "fsdp") else 0
    return others * (gradients + weights)


def _base_bytes(size: ModelSize, setup: TrainingSetup, stored: int) -> float:
    """Returns the bytes of all weights, with `stored` bytes for one that isn't quantized."""
    quantized = 0 if setup.quantized == "none" else size.matrices
    return (size.parameters - quantized) * stored + quantized * QUANTIZED_BYTES.get(setup.quantized, 0.0)


def _host_seconds(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig, rates: _Rates) -> float:
    """Returns the seconds of a micro-batch that offloading adds."""
    if parallel.offload == "none":
        return 0.0
    trained = size.trained / setup.ranks
    optimizer = (trained * _OPTIMIZER_BYTES / rates.host + trained / rates.optimizer) / _MICRO_BATCHES
    weights = 2 * _base_bytes(size, setup, setup.stored) / setup.ranks if parallel.offload == "parameters" else 0
    return optimizer + weights / rates.host
