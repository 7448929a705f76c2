"""Floating-point operations that a row of training needs, and the time that a machine's matrix products allow. Pure.

The formula (docs/performance.md explains it), for LoRA on q and v of a decoder with tied or untied head:

    forward    2 N_blocks a token + 2 N_head a label position
    backward   the same again (dX only: frozen weights have no gradient), but nothing of q, k and v of the lowest layer,
               below which nothing learns
    adapters   6 N_lora a token
    attention  12 h a pair of tokens that may see each other, and layer (4 h forward, 8 h backward; h = heads x size)

Only what has to be computed counts: no padding, no masked pairs, no recomputation, no head where nothing is learnt,
and an instruction that rows share counts once where it was computed once. So a trainer can't look better by waste.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A matrix: `outputs` x `inputs` weights, once in each of `layers` layers."""

    name: str
    inputs: int
    outputs: int
    layers: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.layers


@dataclass(frozen=True)
class Dimensions:
    """Of a Llama-like decoder, from its config.json."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, int]) -> Dimensions:
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
        """Those that every token goes through."""
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
        return Shape("head", self.hidden, self.vocabulary, 1)

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on q and v."""
        return sum(rank * (s.inputs + s.outputs) * s.layers for s in self.matrices if s.name in ("q", "v"))


@dataclass(frozen=True)
class Work:
    """What was computed: tokens without padding, label positions, pairs of tokens that see each other."""

    tokens: float
    labels: float
    pairs: float


@dataclass(frozen=True)
class Flops:
    """By kind of work; `forward` and `backward` by matrix."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    adapters: float
    attention: float

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values()) + self.adapters + self.attention


def needed(size: Dimensions, rank: int, work: Work) -> Flops:
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
    """Measured FLOP/s of each matrix, forward (x W^T) and backward (dY W), at one number of rows."""

    rows: int
    forward: Mapping[str, float]
    backward: Mapping[str, float]

    def seconds(self, flops: Flops) -> float:
        """The least time: every matrix at its own rate, the rest at their mean rate."""
        matrices = sum(flops.forward[name] / self.forward[name] for name in flops.forward)
        matrices += sum(flops.backward[name] / self.backward[name] for name in flops.backward)
        counted = sum(flops.forward.values()) + sum(flops.backward.values())
        return matrices * flops.total / counted if counted else 0.0

    def rate(self, flops: Flops) -> float:
        """FLOP/s at the roof for this mixture of work."""
        return flops.total / self.seconds(flops)


def highest(roofs: list[Roof], flops: Flops) -> Roof:
    """The strictest of several measurements."""
    return max(roofs, key=lambda roof: roof.rate(flops))


def computed(seen: Work, computed_per_seen: float, common_prefix: int) -> Work:
    """What is left of `seen` where some tokens of a prefix that rows share were computed once.

    A saved token is one of the prefix, which sees half of the prefix on average.
    """
    saved = seen.tokens * max(0.0, 1 - computed_per_seen)
    return Work(seen.tokens - saved, seen.labels, seen.pairs - saved * (common_prefix + 1) / 2)
