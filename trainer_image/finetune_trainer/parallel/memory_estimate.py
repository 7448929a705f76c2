"""Estimates how much memory a rank needs, in bytes by purpose, from a model's size, a setup and a
strategy.

This module is pure and doesn't import torch.

Whatever can't be known is estimated on the safe side. docs/decisions/0019 compares the estimates
with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from finetune_api.spec.hardware import Offload, Strategy
from finetune_trainer.kernels.sizes import ATTENTION_SCORES, CHUNK_BYTES, SOFTMAX_BYTES, UNFUSED_CHUNK_BYTES
from finetune_trainer.model_folder import can_be_mapped
from finetune_trainer.parallel.estimate import activations, zero_memory
from finetune_trainer.parallel.estimate.host_memory import HostMemory, gib
from finetune_trainer.parallel.estimate.recomputation import NOTHING, Recomputation
from finetune_trainer.parallel.limits import GRADIENT_BUCKET
from finetune_trainer.parallel.model_size import ModelSize

_MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1, "adafactor": 0.1, "muon": 8.0}
QUANTIZED_BYTES = {"int8": 1.01, "nf4": 0.52}
"""Bytes per value of a quantized matrix, including its constants."""
_CONSTANT_BYTES = {"int8": 0.01, "nf4": 0.02}  # those alone, which fsdp doesn't shard
_SOFTMAX_BYTES = 3 * max(SOFTMAX_BYTES.values())
"""Float32 logits whose softmax is computed at a time, their gradient, and what is in between."""
_SCORE_BYTES = 5 * 4 * ATTENTION_SCORES
"""Float32 scores of a chunk, their gradients, their mask and what is computed in between."""
_FILE_BYTES = 2  # per weight of a result: one in float32 needs no copy in another number format
_FORMATS = {2: "BF16", 4: "F32"}  # by bytes per weight
_ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class TrainingSetup:
    """Describes what is trained, and how.

    `stored` is the number of bytes per weight of the base. With `half`, matrix products are in
    bfloat16. `full` means full fine-tuning, as opposed to adapters. With `reads_base`, the method
    reads the base's weights outside of their layers. The ranks run on `nodes` nodes. Unless
    `shards_checkpoints`, rank 0 holds a copy of everything that a checkpoint contains. With
    `shares_prefixes`, a prefix that packed examples share may be computed once. `parts` is the
    number of ranks that share each row.
    """

    ranks: int
    optimizer: str
    stored: int
    half: bool
    full: bool
    quantized: Literal["none", "int8", "nf4"] = "none"
    reads_base: bool = False
    device: Literal["cpu", "cuda"] = "cuda"
    nodes: int = 1
    shards_checkpoints: bool = True
    shares_prefixes: bool = True
    parts: int = 1

    @property
    def ranks_per_node(self) -> int:
        """How many ranks share the memory of a host."""
        return max(1, self.ranks // self.nodes)

    def supports(self, strategy: Strategy) -> bool:
        """Returns whether a strategy can train this setup. The API rejects a named strategy that
        can't."""
        if strategy == "ddp":
            return True
        if self.optimizer != "adamw" or self.quantized == "int8":
            return False
        if self.quantized == "nf4":
            return strategy == "fsdp" and not self.reads_base
        return not (self.reads_base and strategy == "zero3")


@dataclass(frozen=True)
class ParallelConfig:
    """Describes how weights, gradients and moments are distributed, and which activations are
    computed again in the backward pass instead of being stored. fsdp shards each of the
    `replicas` copies of the model over as many ranks; several copies mean one on every node."""

    strategy: Strategy
    offload: Offload = "none"
    recompute: Recomputation = NOTHING
    replicas: int = 1

    @property
    def kind(self) -> str:
        """The strategy and the offload in words."""
        return self.strategy if self.offload == "none" else f"{self.strategy}, {self.offload} offloaded"

    def __str__(self) -> str:
        kind = f"{self.kind} within each of {self.replicas} nodes" if self.replicas > 1 else self.kind
        return f"{kind}, {self.recompute}" if self.recompute else kind


@dataclass(frozen=True)
class MemoryEstimate:
    """Holds the bytes that one rank needs.

    `token` is needed for each token that is computed at a time. `logits` are needed while the loss
    is computed, and `buffers`, the messages with gradients and the scores of attention without a
    kernel, only later. `host` is needed if the ranks compute on GPUs.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    logits: int
    token: activations.TokenBytes
    host: HostMemory

    @property
    def fixed(self) -> int:
        """The bytes that don't depend on the number of tokens."""
        return self.total(0)

    @property
    def per_token(self) -> int:
        """The bytes of a further token if there are many."""
        return self.token.stored + max(self.token.outside, self.token.layer)

    def total(self, tokens: int) -> int:
        """Returns the bytes that are needed to compute `tokens` tokens at a time."""
        return sum(self._parts(tokens).values())

    def fitting_tokens(self, size: int) -> int:
        """Returns how many tokens can be computed at a time in `size` bytes; negative if not even
        the rest fits."""
        left = size - self.weights - self.gradients - self.optimizer
        loss = (left - self.logits) // max(1, self.token.stored + self.token.outside)
        backward = (left - self.buffers) // max(1, self.token.stored + self.token.layer)
        return min(loss, backward)

    def table(self, tokens: int) -> str:
        """Returns the parts of `total` in words, for the log."""
        return ", ".join(f"{name} {gib(size)}" for name, size in self._parts(tokens).items())

    def _parts(self, tokens: int) -> dict[str, int]:
        """Returns what is needed at the end of the forward pass or in the backward pass of a layer,
        whichever is more."""
        loss, backward = self.token.outside * tokens, self.token.layer * tokens
        at_loss = self.logits + loss >= self.buffers + backward
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            f"activations of {tokens} tokens": self.token.stored * tokens + (loss if at_loss else backward),
            **({"logits": self.logits} if at_loss else {"buffers": self.buffers}),
        }


def memory_estimate(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig) -> MemoryEstimate:
    """Returns the bytes that each rank needs. They are the same on all ranks."""
    ranks, sharded = setup.ranks // parallel.replicas, parallel.strategy in ("zero3", "fsdp")
    constants = int(_quantized_values(size, setup) * _CONSTANT_BYTES.get(setup.quantized, 0.0))
    weights = (_base_bytes(size, setup) - constants) // (ranks if sharded else 1)
    optimizer, gradients = _optimizer_bytes(size, setup, parallel), _gradient_bytes(size, setup, parallel)
    if parallel.replicas > 1 and not setup.full:  # those of adapters stay unsharded until they are reduced
        gradients += size.trained * 4
    offloaded = 0
    if parallel.offload != "none":
        offloaded += optimizer + gradients
        optimizer = 0
        gradients = 0 if parallel.offload == "parameters" else gradients
    if parallel.offload == "parameters":
        offloaded += weights
        weights = 0
    return MemoryEstimate(
        weights=weights + constants + _copies_of_weights(size, setup, parallel),
        gradients=gradients,
        optimizer=optimizer,
        buffers=_buffers(size, setup, parallel) + _scores(size, setup),
        logits=_logits(size, setup),
        token=_bytes_per_token(size, setup, parallel),
        host=_host_memory(size, setup, parallel, offloaded),
    )


def _bytes_per_token(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig) -> activations.TokenBytes:
    """Returns the bytes of activations per token. The formulas for known layers are those of GPUs;
    decision 0019 has measurements of the others on CPUs."""
    precision = activations.Precision(
        setup.half,
        trained=setup.full,
        gathered=parallel.strategy == "fsdp",
        stores_inputs=parallel.strategy == "zero3",
    )
    known = size if setup.device == "cuda" else replace(size, layer=None)
    return activations.bytes_per_token(
        known, precision, recompute=parallel.recompute, shares_prefixes=setup.shares_prefixes, parts=setup.parts
    )


def _logits(size: ModelSize, setup: TrainingSetup) -> int:
    """Returns the bytes of the logits that are computed at a time and, if the output layer is
    trained, of its gradient in float32, which is stored from the forward pass to the backward pass.

    On a GPU, the logits of a chunk need more than their softmax. Without its fused kernel, both are
    needed, and chunks are smaller.
    """
    unfused = UNFUSED_CHUNK_BYTES["cuda"] + _SOFTMAX_BYTES
    logits = max(CHUNK_BYTES["cuda"], unfused) if setup.device == "cuda" else _SOFTMAX_BYTES
    return logits + (4 * size.vocabulary * size.hidden if setup.full or size.trains_head else 0)


def _host_memory(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig, offloaded: int) -> HostMemory:
    """Returns the bytes that the first node needs. `offloaded` is what each rank leaves there.

    A checkpoint is written from a copy of the trained weights and their moments. Of a full model,
    one weight at a time is gathered and converted; `size.largest` is at least as large.
    """
    ranks_here = setup.ranks_per_node
    copy = size.trained * 4 + int(size.trained * _MOMENT_BYTES.get(setup.optimizer, 8.0))
    if setup.shards_checkpoints and parallel.strategy != "ddp":
        copy = copy * ranks_here // setup.ranks
    result = size.largest * (4 + _FILE_BYTES) if setup.full else size.trained * 8
    return HostMemory(
        ranks=ranks_here,
        loading=max(_loading_bytes(size, setup, parallel), ranks_here * offloaded),
        training=ranks_here * offloaded + copy,
        saving=ranks_here * offloaded + result,
    )


def _loading_bytes(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig) -> int:
    """Returns what the first node holds while the model is loaded, besides shards and the pages of
    mapped files, which the kernel can take back. zero3 reads and splits one module at a time."""
    stored = _FORMATS[setup.stored]
    sharded = parallel.strategy == "fsdp"
    if can_be_mapped(size.formats, stored, trained=setup.full and sharded) and setup.quantized == "none":
        return 0
    if parallel.strategy == "zero3":
        return size.largest * setup.stored
    return _base_bytes(size, setup) * (1 if sharded else setup.ranks_per_node)


def _base_bytes(size: ModelSize, setup: TrainingSetup) -> int:
    """Returns the bytes of all weights: those that are trained in float32, the others as they are
    stored or quantized."""
    quantized = _quantized_values(size, setup)
    full_precision = (size.parameters - size.trained - quantized) * setup.stored + size.trained * 4
    return full_precision + int(quantized * QUANTIZED_BYTES.get(setup.quantized, 0.0))


def _quantized_values(size: ModelSize, setup: TrainingSetup) -> int:
    return size.matrices if setup.quantized != "none" else 0


def _gradient_bytes(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig) -> int:
    ranks, largest = setup.ranks // parallel.replicas, size.vocabulary * size.hidden
    if parallel.strategy == "zero2" and parallel.offload == "none":
        return zero_memory.gradients_of_stage_2(size.trained, ranks, largest if size.trained >= largest else 0)
    return size.trained * 4 // (ranks if parallel.strategy in ("zero2", "zero3", "fsdp") else 1)


def _optimizer_bytes(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig) -> int:
    """Returns the bytes of the moments, and of the float32 copy of the trained weights that
    DeepSpeed's optimizer works on."""
    moments = int(size.trained * _MOMENT_BYTES.get(setup.optimizer, 8.0))
    masters = size.trained * 4 if parallel.strategy in _ZERO_STAGES else 0
    return (moments + masters) // (setup.ranks // parallel.replicas if parallel.strategy != "ddp" else 1)


def _copies_of_weights(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig) -> int:
    """Returns the bytes of what is gathered at a time, and of trained weights in bfloat16."""
    trained = size.trained if setup.full else size.vocabulary * size.hidden * size.trains_head
    casts = trained * 2 if setup.half else 0
    if parallel.strategy == "zero3":
        count = size.layers - parallel.recompute.layers(size.layers) if setup.half and setup.full else 0
        head = size.vocabulary * size.hidden if casts else 0
        stored = zero_memory.casts_in_stage_3(size.layer_values, count, head)
        return zero_memory.gathered_by_stage_3(size.parameters, size.largest, setup.stored) + stored
    if parallel.strategy == "fsdp":  # what is outside of the layers stays gathered
        value = 2 if setup.half else setup.stored
        quantized = _quantized_values(size, setup) // size.layers
        layer = (size.layer_values - quantized) * value + quantized * QUANTIZED_BYTES.get(setup.quantized, 0.0)
        return size.largest * value + int(2 * layer)
    return casts


def _buffers(size: ModelSize, setup: TrainingSetup, parallel: ParallelConfig) -> int:
    """Returns the bytes of the gradient messages in float32. `ddp` has a message in memory twice
    while packing it, and so does `fsdp`, whose message has the gradients of a layer."""
    if setup.ranks == 1 and parallel.strategy == "ddp":
        return 0
    if parallel.strategy in _ZERO_STAGES:
        return zero_memory.buffers(_ZERO_STAGES[parallel.strategy], size.trained)
    if parallel.strategy == "fsdp":
        return 2 * 4 * min(size.trained, size.layer_values)
    return 2 * 4 * min(size.trained, GRADIENT_BUCKET)


def _scores(size: ModelSize, setup: TrainingSetup) -> int:
    """Returns the bytes of attention scores that are computed at a time without a kernel."""
    return _SCORE_BYTES if size.chunks_scores or (setup.device == "cuda" and not setup.half) else 0
