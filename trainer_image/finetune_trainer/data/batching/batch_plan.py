"""Plans which examples every optimizer step trains on, on which rank, and in which micro-batch.

Every rank computes the same plan from lengths alone. So the denominator of the loss is known
without communication, resuming means reading `step(n)`, and the order of the data doesn't depend on
the number of ranks. The module is pure and doesn't import torch.

The examples form one endless stream: epoch 0 in a random order, epoch 1 in another, and so on. Step
n, counted from 1, takes the next `global_batch` examples of the stream, so every example comes once
per epoch. Only the last step of a run can be smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batching import bin_packing, packed_layout
from finetune_trainer.data.shared_prefixes import SharedPrefixes

DEFAULT_EPOCHS = 3.0
_SORTED_STEPS = 50  # with by_length: enough for similar lengths within a step, few enough to stay random

MicroBatch = tuple[int, ...]
"""Examples that one rank computes together; empty if the rank only keeps step with the others."""


@dataclass(frozen=True)
class MicroBatchShape:
    """Describes how a global batch is divided. It changes speed and memory, but never the result.

    `world` is the number of ranks, of which those that share rows count as one. If `packed`, a
    micro-batch is a row of examples end to end with at most `tokens` tokens. Otherwise it has at
    most `rows` examples, padded to the longest of them. If `shared`, a prefix that packed examples
    have in common is computed only once. The sizes of packed rows are multiples of `grain`.
    """

    world: int
    rows: int
    tokens: int
    packed: bool
    shared: bool = False
    grain: int = packed_layout.GRAIN

    def __str__(self) -> str:
        return f"up to {self.tokens} tokens" if self.packed else f"up to {self.rows} examples"


@dataclass(frozen=True)
class PlanOptions:
    """Holds how a run is divided into steps.

    At most one of `epochs` and `max_steps` is set; without both there are DEFAULT_EPOCHS epochs. If
    `by_length`, the examples of a step have similar lengths.
    """

    seed: int
    global_batch: int
    epochs: float | None = None
    max_steps: int | None = None
    by_length: bool = False

    def total_examples(self, rows: int) -> int:
        """Return the number of examples that all steps of a run over `rows` rows use."""
        if self.max_steps is not None:
            return self.max_steps * self.global_batch
        return max(1, round((DEFAULT_EPOCHS if self.epochs is None else self.epochs) * rows))


@dataclass(frozen=True)
class Step:
    """Describes one optimizer step. All `micro_batches[rank]` have the same length; ranks that
    share rows count as one."""

    number: int
    epoch: float  # passes over the data that are complete after this step
    examples: tuple[int, ...]
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    tokens: int
    label_tokens: int


@dataclass(frozen=True)
class BatchPlan:
    """Holds the steps of a run, which `make` plans.

    `lengths` and `label_counts` are tokens of each example.
    """

    seed: int
    lengths: NDArray[np.int64]
    label_counts: NDArray[np.int64]
    global_batch: int
    total_steps: int
    total_examples: int
    shape: MicroBatchShape
    prefixes: SharedPrefixes | None = None
    by_length: bool = False
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """The number of examples of an epoch."""
        return len(self.lengths)

    def halved(self, times: int) -> BatchPlan:
        """Return the same steps in smaller micro-batches.

        The size of the largest micro-batch, halved `times` times, becomes the limit, but at least
        one example is computed at a time.
        """
        if times == 0:
            return self
        tokens = max(self._positions)
        rows = max(len(micro_batch) for micro_batch in self._first_micro_batches())
        return replace(self, shape=replace(self.shape, tokens=max(1, tokens >> times), rows=max(1, rows >> times)))

    @property
    def is_smallest(self) -> bool:
        """Whether more halvings save no memory: the largest micro-batch is a single example."""
        sizes = [(size, len(m)) for size, m in zip(self._positions, self._first_micro_batches(), strict=True)]
        return max(sizes)[1] < 2

    @property
    def epochs(self) -> float:
        """The number of passes over the data."""
        return self.total_examples / self.rows

    def step(self, number: int) -> Step:
        """Return a step by its number from 1 to total_steps.

        Raises ValueError for any other number.
        """
        if not 1 <= number <= self.total_steps:
            raise ValueError(f"step {number} isn't in 1 … {self.total_steps}")
        begin = (number - 1) * self.global_batch
        end = min(number * self.global_batch, self.total_examples)
        examples = tuple(self._example_at(position) for position in range(begin, end))
        return Step(
            number,
            end / self.rows,
            examples,
            split_into_micro_batches(examples, self.lengths, self.shape, self.prefixes),
            int(self.lengths[list(examples)].sum()),
            int(self.label_counts[list(examples)].sum()),
        )

    def padding_share(self) -> float:
        """Return the share of computed positions that hold no token, from 0 to 1."""
        tokens, computed = self.work()
        return 1 - computed / self._padded_positions if self.shape.packed else 1 - tokens / computed

    def computed_share(self) -> float:
        """Return how many tokens are computed for each token of the examples, without padding.

        It is below 1 if prefixes are shared.
        """
        tokens, computed = self.work()
        return computed / tokens if self.shape.packed else 1.0

    def work(self) -> tuple[int, int]:
        """Return (tokens of the examples, positions computed for them) over the first steps."""
        return self._work

    @cached_property
    def _work(self) -> tuple[int, int]:
        return sum(self.step(number).tokens for number in self._first_steps()), sum(self._positions)

    @cached_property
    def _positions(self) -> list[int]:
        """The computed positions of each micro-batch of the first steps."""
        micro_batches = self._first_micro_batches()
        return [positions(micro_batch, self.lengths, self.shape, self.prefixes) for micro_batch in micro_batches]

    def _first_micro_batches(self) -> Iterator[MicroBatch]:
        return (m for n in self._first_steps() for rank in self.step(n).micro_batches for m in rank)

    @property
    def _padded_positions(self) -> int:
        return sum(packed_layout.rounded_up(positions, self.shape.grain) for positions in self._positions)

    def _first_steps(self, limit: int = 200) -> range:
        return range(1, min(self.total_steps, limit) + 1)

    def _example_at(self, position: int) -> int:
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
    options: PlanOptions,
    lengths: NDArray[np.int64],
    label_counts: NDArray[np.int64],
    shape: MicroBatchShape,
    prefixes: SharedPrefixes | None = None,
) -> BatchPlan:
    """Plan all steps over examples of these lengths. Raises ValueError if there is no example."""
    if len(lengths) == 0:
        raise ValueError("a plan needs at least one example")
    total_examples = options.total_examples(len(lengths))
    return BatchPlan(
        options.seed,
        lengths,
        label_counts,
        options.global_batch,
        math.ceil(total_examples / options.global_batch),
        total_examples,
        shape,
        prefixes,
        options.by_length,
    )


def shape(
    world: int, micro_batch_size: int | str, tokens: int, longest: int, *, packed: bool, device_type: str = "cpu",
    parts: int = 1,
) -> MicroBatchShape:  # fmt: skip
    """Return the shape for a run. Packed examples share prefixes.

    `micro_batch_size` is training.microBatchSize, `tokens` is how many tokens a rank, or the ranks
    that share a row, can compute at a time, and `longest` is the number of tokens in the longest
    row. `parts` is how many ranks share a row. If the size is chosen automatically, padding doesn't
    make a packed row longer than `tokens` on a GPU, unless the longest row alone does.
    """
    rows = micro_batch_size if isinstance(micro_batch_size, int) else max(1, tokens // longest)
    grain = packed_layout.grain(device_type) * parts
    if packed and device_type != "cpu" and micro_batch_size == "auto":
        tokens = max(longest, tokens // grain * grain)
    return MicroBatchShape(world, rows, tokens, packed, shared=packed, grain=grain)


def order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """Return the examples of an epoch in the order in which they are trained on."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def order_by_length(seed: int, epoch: int, lengths: NDArray[np.int64], batch: int) -> NDArray[np.int64]:
    """Return an order like `order`, except that the examples of a step have similar lengths.

    As in Transformers, the shuffled examples are sorted within every 50 steps. Steps come in a
    random order, and the longest step of a run comes first. Steps are aligned to the stream, so the
    examples that complete the last step of the previous epoch stay as they were drawn.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    shuffled = random.permutation(len(lengths))
    border = min(-epoch * len(lengths) % batch, len(lengths))
    begun, rest = shuffled[:border], shuffled[border:]
    chunk = batch * _SORTED_STEPS
    chunks = [rest[begin : begin + chunk] for begin in range(0, len(rest), chunk)]
    ordered = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in chunks] or [rest])
    complete = len(ordered) // batch * batch
    steps = random.permutation(ordered[:complete].reshape(-1, batch), axis=0)
    if epoch == 0 and len(steps):  # a lack of memory shows in the first step
        longest = int(lengths[steps].max(axis=1).argmax())
        steps[[0, longest]] = steps[[longest, 0]]
    return np.concatenate([begun, steps.reshape(-1), ordered[complete:]])


def split_into_micro_batches(
    examples: Sequence[int], lengths: NDArray[np.int64], shape: MicroBatchShape, prefixes: SharedPrefixes | None = None
) -> tuple[tuple[MicroBatch, ...], ...]:
    """Return the micro-batches of each rank.

    Every example comes once, the ranks have nearly equal work, and each rank has the same number of
    micro-batches.
    """
    if shape.shared and prefixes is not None:
        micro_batches = bin_packing.shared(examples, lengths, shape.world, shape.tokens, prefixes)
    elif shape.packed:
        micro_batches = bin_packing.packed(examples, lengths, shape.world, shape.tokens)
    else:
        micro_batches = bin_packing.padded(examples, lengths, shape.world, shape.rows)
    return tuple(tuple(micro_batches[rank :: shape.world]) for rank in range(shape.world))


def positions(
    micro_batch: MicroBatch, lengths: NDArray[np.int64], shape: MicroBatchShape, prefixes: SharedPrefixes | None = None
) -> int:
    """Return the number of token positions that are computed, without the padding of a packed row.

    A rank that only keeps step with the others computes one.
    """
    if not micro_batch:
        return 1
    own = lengths[list(micro_batch)]
    if shape.shared and prefixes is not None:
        return int(own.sum()) - sum(prefixes.shared(micro_batch, lengths))
    return int(own.sum()) if shape.packed else int(own.max()) * len(micro_batch)
