"""Computes the roofline of a cell: the time of its kernels, by kind, extrapolated from a few layers
to all layers of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from benchmarks.gpu import flops
from benchmarks.gpu.roofline import hardware
from benchmarks.gpu.roofline.cells import Cell
from benchmarks.gpu.roofline.kernels import Kernel, Recorder

from finetune_trainer.kernels import chunked_cross_entropy
from trainer.support import fake_step


@dataclass(frozen=True)
class Recording:
    """The kernels of a micro-batch with few layers, and how often the host waited for the GPU."""

    kernels: tuple[Kernel, ...]
    host_waits: int


@dataclass(frozen=True)
class Roofline:
    """A model of a micro-batch on a GPU.

    `seconds` and `bytes` are by kind of kernel. `kernels_per_layer` and `kernels` are counts, of a
    layer and of the whole micro-batch. `wide_products` is the number of products in float32 of the
    recorded layers.
    """

    cell: Cell
    seconds: dict[str, float]
    bytes: dict[str, float]
    kernels_per_layer: int
    kernels: int
    host_waits: int
    wide_products: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one GPU."""
        return self.cell.tokens / sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """The share of the peak that necessary operations use: no recomputation, no padding."""
        cell = self.cell
        labels = cell.tokens - cell.rows
        needed = flops.needed(
            cell.shape, tokens=cell.tokens, labels=labels, pairs=cell.pairs, full=cell.lora is None
        )  # fmt: skip
        return needed / sum(self.seconds.values()) / hardware.PEAK

    def share(self, kind: str) -> float:
        """Returns the share of the time that kernels of a kind take."""
        return self.seconds.get(kind, 0.0) / sum(self.seconds.values())

    def record(self) -> dict[str, Any]:
        """Returns the figures as JSON."""
        kinds = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)
        return {
            "cell": self.cell.name,
            "mfu": round(self.mfu, 4),
            "tokens_per_second": round(self.tokens_per_second),
            "limits": [
                {
                    "kind": kind,
                    "share": round(self.share(kind), 4),
                    "milliseconds": round(self.seconds[kind] * 1e3, 2),
                    "gigabytes": round(self.bytes[kind] / 1e9, 1),
                }
                for kind in kinds
            ],
            "tokens": self.cell.tokens,
            "kernels": self.kernels,
            "kernels_per_layer": self.kernels_per_layer,
            "host_waits": self.host_waits,
        }


def roofline(cell: Cell) -> Roofline:
    """Records one and two layers, and extrapolates linearly."""
    one, two = (recording(cell, layers) for layers in (1, 2))
    more = cell.shape.layers - 1

    def extrapolated(first: Counter[str], second: Counter[str]) -> dict[str, float]:
        return {kind: first[kind] + more * (second[kind] - first[kind]) for kind in sorted({*first, *second})}

    per_layer = len(two.kernels) - len(one.kernels)
    return Roofline(
        cell=cell,
        seconds=extrapolated(_seconds(one), _seconds(two)),
        bytes=extrapolated(_bytes(one), _bytes(two)),
        kernels_per_layer=per_layer,
        kernels=len(one.kernels) + more * per_layer,
        host_waits=two.host_waits,
        wide_products=sum(kernel.is_product and kernel.dtype == torch.float32 for kernel in two.kernels),
    )


def recording(cell: Cell, layers: int) -> Recording:
    """Records a micro-batch with this number of layers: forward pass, loss and backward pass."""
    with fake_step.training(cell.step(layers)) as fake:
        recorder = Recorder(cell.pairs, cell.shape.vocabulary)
        with recorder, _head_recorded(recorder), fake.loss_sum.packed_context(fake.batch):
            loss = fake.loss_sum(fake.loaded.model, fake.batch)
            recorder.backward = True
            loss.backward()  # type: ignore[no-untyped-call]
        return Recording(tuple(recorder.kernels), fake.host_waits.total())


@contextmanager
def _head_recorded(recorder: Recorder) -> Iterator[None]:
    """Attributes what the loss of the output head computes to it."""
    function = chunked_cross_entropy._LossSum
    forward, backward = function.forward, function.backward

    def within(original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with recorder.in_head():
                return original(*arguments)

        return staticmethod(call)

    with (
        mock.patch.object(function, "forward", within(forward)),
        mock.patch.object(function, "backward", within(backward)),
    ):
        yield


def _seconds(recorded: Recording) -> Counter[str]:
    total: Counter[str] = Counter()
    for kernel in recorded.kernels:
        total[kernel.kind] += hardware.seconds(kernel)  # type: ignore[assignment]
    return total


def _bytes(recorded: Recording) -> Counter[str]:
    total: Counter[str] = Counter()
    for kernel in recorded.kernels:
        total[kernel.kind] += kernel.bytes  # type: ignore[assignment]
    return total
