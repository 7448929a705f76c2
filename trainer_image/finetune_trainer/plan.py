"""The heart: which examples every optimizer step learns from, on which rank, in which micro-batch. Pure; no torch.

Every rank computes the same answer from lengths alone, so the denominator of the loss is known without communication,
resuming is reading `step(n)`, and the order of the data doesn't depend on the number of ranks.

The examples form one endless stream: epoch 0 in a random order, epoch 1 in another, and so on. Step n (counted from 1)
takes the stream's next `global_batch` examples, so that every example comes once an epoch; only a run's last step can
be smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetune_trainer import bins, layout
from finetune_trainer.prefixes import Prefixes

DEFAULT_EPOCHS = 3.0
_SORTED_TOGETHER = 50  # steps, where examples are grouped by length: enough to be alike, few enough to stay random

Micro = tuple[int, ...]
"""Examples that one rank computes at once; empty where a rank only keeps step with the others."""


@dataclass(frozen=True)
class Shape:
    """How a global batch is cut. Changes speed and memory, never the result.

    `packed`: a micro-batch is examples end to end, at most `tokens` of them. Else at most `rows` examples, padded to
    the longest of them. `shared`: what packed examples begin with alike is computed once.
    """

    world: int
    rows: int
    tokens: int
    packed: bool
    shared: bool = False

    def __str__(self) -> str:
        return f"up to {self.tokens} tokens" if self.packed else f"up to {self.rows} examples"


@dataclass(frozen=True)
class Step:
    """One optimizer step. `micros[rank]` has the same length for every rank."""

    number: int
    epoch: float  # passes done after this step
    examples: tuple[int, ...]
    micros: tuple[tuple[Micro, ...], ...]
    tokens: int
    label_tokens: int


@dataclass(frozen=True)
class Plan:
    """`lengths` and `label_counts` in tokens, by example. Build it with `make`."""

    seed: int
    lengths: NDArray[np.int64]
    label_counts: NDArray[np.int64]
    global_batch: int
    total_steps: int
    total_examples: int
    shape: Shape
    prefixes: Prefixes | None = None
    by_length: bool = False
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def halved(self, times: int) -> Plan:
        """The same steps in smaller micro-batches: the largest one, halved so often, is the most that is computed at
        once. One example is the least."""
        if times == 0:
            return self
        micros = [m for n in self._first_steps() for rank in self.step(n).micros for m in rank]
        tokens = max(self._positions)
        rows = max(len(micro) for micro in micros)
        return replace(self, shape=replace(self.shape, tokens=max(1, tokens >> times), rows=max(1, rows >> times)))

    @property
    def epochs(self) -> float:
        return self.total_examples / self.rows

    def step(self, number: int) -> Step:
        """Step 1 … total_steps."""
        if not 1 <= number <= self.total_steps:
            raise ValueError(f"step {number} isn't in 1 … {self.total_steps}")
        begin = (number - 1) * self.global_batch
        end = min(number * self.global_batch, self.total_examples)
        chosen = tuple(self._at(position) for position in range(begin, end))
        return Step(
            number,
            end / self.rows,
            chosen,
            cut(chosen, self.lengths, self.shape, self.prefixes),
            int(self.lengths[list(chosen)].sum()),
            int(self.label_counts[list(chosen)].sum()),
        )

    def padding_share(self) -> float:
        """Share of computed positions that hold no token."""
        seen, computed = self.work()
        return 1 - computed / self._filled if self.shape.packed else 1 - seen / computed

    def computed_share(self) -> float:
        """Tokens that are computed for each one of the examples, padding aside; below 1 where beginnings are shared."""
        seen, computed = self.work()
        return computed / seen if self.shape.packed else 1.0

    def work(self) -> tuple[int, int]:
        """(tokens of the examples, positions that are computed for them), over the first steps."""
        return self._work

    @cached_property
    def _work(self) -> tuple[int, int]:
        return sum(self.step(number).tokens for number in self._first_steps()), sum(self._positions)

    @cached_property
    def _positions(self) -> list[int]:
        """Of each micro-batch of the first steps."""
        micros = (m for number in self._first_steps() for rank in self.step(number).micros for m in rank)
        return [positions(micro, self.lengths, self.shape, self.prefixes) for micro in micros]

    @property
    def _filled(self) -> int:
        return sum(map(layout.filled, self._positions))

    def _first_steps(self, most: int = 200) -> range:
        return range(1, min(self.total_steps, most) + 1)

    def _at(self, position: int) -> int:
        epoch, within = divmod(position, self.rows)
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = (
                order_by_length(self.seed, epoch, self.lengths, self.global_batch)
                if self.by_length
                else order(self.seed, epoch, self.rows)
            )
        return int(self._orders[epoch][within])


def make(
    *,
    seed: int,
    lengths: NDArray[np.int64],
    label_counts: NDArray[np.int64],
    global_batch: int,
    epochs: float | None,
    max_steps: int | None,
    shape: Shape,
    prefixes: Prefixes | None = None,
    by_length: bool = False,
) -> Plan:
    """Either of epochs and max_steps; three epochs where both are None."""
    rows = len(lengths)
    if rows == 0:
        raise ValueError("a plan needs at least one example")
    if max_steps is not None:
        total = max_steps * global_batch
    else:
        total = max(1, round((DEFAULT_EPOCHS if epochs is None else epochs) * rows))
    steps = math.ceil(total / global_batch)
    return Plan(seed, lengths, label_counts, global_batch, steps, total, shape, prefixes, by_length)


def shape(world: int, asked: int | str, tokens: int, packed: bool, longest: int, *, shared: bool = False) -> Shape:
    """`asked` is training.microBatchSize, `tokens` what a rank computes at once, `longest` the longest row's tokens."""
    rows = asked if isinstance(asked, int) else max(1, tokens // longest)
    return Shape(world, rows, tokens, packed, shared)


def order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The examples of an epoch in the order in which they are learnt."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def order_by_length(seed: int, epoch: int, lengths: NDArray[np.int64], batch: int) -> NDArray[np.int64]:
    """As `order`, but a step's examples are of like length; steps come in a random order, a run's longest first.

    As Transformers does it: the shuffled examples are sorted within every 50 steps. Steps lie where they lie in the
    stream, so the examples that end the last epoch's last step stay as they were drawn.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    shuffled = random.permutation(len(lengths))
    border = min(-epoch * len(lengths) % batch, len(lengths))
    begun, rest = shuffled[:border], shuffled[border:]
    together = batch * _SORTED_TOGETHER
    parts = [rest[at : at + together] for at in range(0, len(rest), together)]
    ordered = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts] or [rest])
    whole = len(ordered) // batch * batch
    steps = random.permutation(ordered[:whole].reshape(-1, batch), axis=0)
    if epoch == 0 and len(steps):  # what doesn't fit into memory shows at once
        longest = int(lengths[steps].max(axis=1).argmax())
        steps[[0, longest]] = steps[[longest, 0]]
    return np.concatenate([begun, steps.reshape(-1), ordered[whole:]])


def cut(
    chosen: Sequence[int], lengths: NDArray[np.int64], shape: Shape, prefixes: Prefixes | None = None
) -> tuple[tuple[Micro, ...], ...]:
    """The examples as micro-batches by rank: every example once, ranks in balance, each rank as many as the others."""
    if shape.shared and prefixes is not None:
        micros = bins.shared(chosen, lengths, shape.world, shape.tokens, prefixes)
    elif shape.packed:
        micros = bins.packed(chosen, lengths, shape.world, shape.tokens)
    else:
        micros = bins.padded(chosen, lengths, shape.world, shape.rows)
    return tuple(tuple(micros[rank :: shape.world]) for rank in range(shape.world))


def positions(micro: Micro, lengths: NDArray[np.int64], shape: Shape, prefixes: Prefixes | None = None) -> int:
    """Computed token positions, without what fills a packed row up; a rank that only keeps step computes one."""
    if not micro:
        return 1
    own = lengths[list(micro)]
    if shape.shared and prefixes is not None:
        return int(own.sum()) - sum(prefixes.shared(micro, lengths))
    return int(own.sum()) if shape.packed else int(own.max()) * len(micro)
