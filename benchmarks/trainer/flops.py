"""Counts the floating-point operations of training, and the time that matrix products need. Pure.

The formula (docs/performance.md explains it), for LoRA on q and v of a decoder with a tied or
untied head:

    forward    2 N_blocks per token + 2 N_head per label position
    backward   the same (dX only: frozen weights have no gradient), except q, k and v of the lowest
               layer, below which nothing is trained
    adapters   6 N_lora per token
    attention  12 h per layer and pair of tokens that attend to each other (4 h forward, 8 h
               backward; h = heads x size)

Only what has to be computed counts: no padding, no masked pairs, no recomputation, and no head for
positions without a label. A prefix that rows share counts once if it was computed once. So wasted
work can't make a trainer look better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A matrix of `outputs` x `inputs` weights, which occurs once in each of `layers` layers."""

    name: str
    inputs: int
    outputs: int
    layers: int

    @property
    def weights(self) -> int:
        """The number of weights in all layers."""
        return self.inputs * self.outputs * self.layers


@dataclass(frozen=True)
class Dimensions:
    """The dimensions of a Llama-like decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, int]) -> Dimensions:
        """Reads them from a model's config.json."""
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
        )

    @property
    def matrices(self) -> tuple[Shape, ...]:
        """The matrices that every token is multiplied with."""
        query, key = self.heads * self.head_size, self.key_heads * self.head_size
        sizes = {
            "q": (self.hidden, query),
            "k": (self.hidden, key),
            "v": (self.hidden, key),
            "o": (query, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }
        return tuple(Shape(name, *size, self.layers) for name, size in sizes.items())

    @property
    def head(self) -> Shape:
        """The output layer."""
        return Shape("head", self.hidden, self.vocabulary, 1)

    def adapters(self, rank: int) -> int:
        """Returns the number of parameters of LoRA on q and v."""
        return sum(rank * (s.inputs + s.outputs) * s.layers for s in self.matrices if s.name in ("q", "v"))


@dataclass(frozen=True)
class Work:
    """An amount of training work.

    It is given in tokens without padding, label positions, and pairs of tokens that attend to each
    other.
    """

    tokens: float
    labels: float
    pairs: float


@dataclass(frozen=True)
class Flops:
    """FLOPs by kind of work; those of `forward` and `backward` are by matrix."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    adapters: float
    attention: float

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return sum(self.forward.values()) + sum(self.backward.values()) + self.adapters + self.attention


def needed(size: Dimensions, rank: int, work: Work) -> Flops:
    """Returns the FLOPs of `work` with adapters of that rank, by the formula above."""
    forward = {s.name: 2 * s.weights * work.tokens for s in size.matrices}
    lowest = {"q", "k", "v"}
    backward = {s.name: 2 * s.inputs * s.outputs * (s.layers - (s.name in lowest)) * work.tokens for s in size.matrices}
    head = 2 * size.head.weights * work.labels
    attention = 12 * size.heads * size.head_size * size.layers * work.pairs
    return Flops(
        {**forward, "head": head}, {**backward, "head": head}, 6 * size.adapters(rank) * work.tokens, attention
    )


@dataclass(frozen=True)
class Roof:
    """Measured FLOP/s by matrix, forward (x W^T) and backward (dY W), for `rows` rows of input."""

    rows: int
    forward: Mapping[str, float]
    backward: Mapping[str, float]

    def seconds(self, flops: Flops) -> float:
        """Returns the least time: each matrix at its own rate, and the rest at their mean rate."""
        matrices = sum(flops.forward[name] / self.forward[name] for name in flops.forward)
        matrices += sum(flops.backward[name] / self.backward[name] for name in flops.backward)
        counted = sum(flops.forward.values()) + sum(flops.backward.values())
        return matrices * flops.total / counted if counted else 0.0

    def rate(self, flops: Flops) -> float:
        """Returns the FLOP/s that the roof allows for this mixture of work."""
        return flops.total / self.seconds(flops)


def highest(roofs: list[Roof], flops: Flops) -> Roof:
    """Returns the strictest of several measurements: the one with the highest rate."""
    return max(roofs, key=lambda roof: roof.rate(flops))


def computed(work: Work, computed_per_seen: float, common_prefix: int) -> Work:
    """Returns the part of `work` that was computed, if rows share a prefix that is computed once.

    `computed_per_seen` is the share of tokens that were computed. A saved token is one of the
    prefix, and attends to half of the prefix on average.
    """
    saved = work.tokens * max(0.0, 1 - computed_per_seen)
    return Work(work.tokens - saved, work.labels, work.pairs - saved * (common_prefix + 1) / 2)
