"""How much memory a rank needs, by strategy: a model's size and a setting → bytes by part. Pure, no torch.

On the safe side where it can't be known. How far from what is measured: docs/decisions/0019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_trainer.model_size import ModelSize

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
Offload = Literal["none", "optimizer", "parameters"]

_MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1, "adafactor": 0.1, "muon": 8.0}
_QUANTIZED_BYTES = {"int8": 1.01, "nf4": 0.52}  # with their constants
_MESSAGE = 64 * 2**20  # bytes that one message of gradients holds, twice while it is packed
_HEAD = 3 * 2**26  # a chunk of float32 logits, its gradient, and what is in between
ZERO_BUCKET = 5 * 10**7  # values that DeepSpeed reduces at once
_ZERO_LIVE = 10**9  # weights that its stage 3 may keep whole


@dataclass(frozen=True)
class Setting:
    """What is trained and how. `stored`: bytes of a base weight; `half`: products are in bfloat16."""

    ranks: int
    optimizer: str
    stored: int
    half: bool
    full: bool
    quantized: Literal["none", "int8", "nf4"] = "none"
    whole: bool = False  # the method reads the base's weights outside of their layers

    def carries(self, strategy: Strategy) -> bool:
        """Whether a strategy can do it; the API refuses what is named and can't."""
        if self.optimizer != "adamw" or self.quantized != "none":
            return strategy == "ddp"
        return not (self.whole and strategy == "zero3")


@dataclass(frozen=True)
class Way:
    """How weights, gradients and moments are held. `recompute`: activations aren't kept but computed again."""

    strategy: Strategy
    offload: Offload = "none"
    recompute: bool = False

    @property
    def kind(self) -> str:
        return self.strategy if self.offload == "none" else f"{self.strategy}, {self.offload} offloaded"

    def __str__(self) -> str:
        return f"{self.kind}, activations recomputed" if self.recompute else self.kind


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank; `token` for each that is computed at once, `host` beside a GPU."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    head: int
    token: int
    host: int

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.head

    def total(self, tokens: int) -> int:
        return self.fixed + tokens * self.token

    def table(self, tokens: int) -> str:
        """For the log."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "buffers": self.buffers,
            f"activations of {tokens} tokens": tokens * self.token,
            "logits": self.head,
        }
        return ", ".join(f"{name} {gib(size)}" for name, size in parts.items())


def footprint(size: ModelSize, setting: Setting, way: Way) -> Footprint:
    """All ranks alike; rank 0 of fsdp needs the whole model in the host's memory once, while it is loaded."""
    ranks, stage = setting.ranks, {"zero1": 1, "zero2": 2, "zero3": 3}.get(way.strategy, 0)
    few = size.matrices if setting.quantized != "none" else 0
    base = (size.parameters - size.trained - few) * setting.stored + size.trained * 4
    base += int(few * _QUANTIZED_BYTES.get(setting.quantized, 0.0))
    split = way.strategy in ("zero3", "fsdp")
    moments = size.trained * _MOMENT_BYTES.get(setting.optimizer, 8.0)
    masters = size.trained * 4 if stage else 0  # DeepSpeed steps on a copy of its own
    gradients = size.trained * 4
    live = min(size.parameters, _ZERO_LIVE + size.largest) if way.strategy == "zero3" else 2 * size.largest
    whole = live * setting.stored if split else 0
    casts = size.trained * 2 if setting.half and setting.full else 0
    at_rest = base // ranks if split else base
    kept = (int(moments) + masters) // (ranks if way.strategy != "ddp" else 1)
    left = gradients // (ranks if split or stage == 2 else 1)
    away = 0
    if way.offload != "none":
        away += kept + left
        kept = 0
        left = 0 if way.offload == "parameters" else left
    if way.offload == "parameters":
        away += at_rest
        at_rest = 0
    return Footprint(
        weights=at_rest + whole + (casts // ranks if split else casts),
        gradients=left,
        optimizer=kept,
        buffers=_buffers(size, setting, way),
        head=_HEAD,
        token=bytes_per_token(size, setting, recompute=way.recompute),
        host=max(away, 0 if split else base),
    )


def _buffers(size: ModelSize, setting: Setting, way: Way) -> int:
    """For gradients on their way."""
    if setting.ranks == 1 and way.strategy == "ddp":
        return 0
    if way.strategy.startswith("zero"):
        return 4 * min(size.trained, ZERO_BUCKET)
    return 2 * min(size.trained * 4, _MESSAGE)


def bytes_per_token(size: ModelSize, setting: Setting, *, recompute: bool) -> int:
    """What is kept for the backward pass: norms, q k v and their rotated copies, attention's output, gate, up, product;
    in full training the inputs of products too. Recomputing keeps a layer's input, and one layer at a time."""
    wide = 4 if not setting.half else 2
    layer = (12 * size.hidden + 5 * size.intermediate) * wide + (4 * size.hidden * 2 if setting.half else 0)
    if not recompute:
        return size.layers * layer
    return size.layers * size.hidden * 4 + 2 * layer


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
