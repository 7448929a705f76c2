"""Computes rows that several ranks share, each in a process of its own, and compares loss and
gradients with those of whole rows."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.data import splits, token_cache
from finetune_trainer.data.batching.batch_plan import MicroBatch
from finetune_trainer.data.batching.collator import Batch, Collator
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.data.splits import Split
from finetune_trainer.model import freezing, loading
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.sequence import groups
from finetune_trainer.parallel.strategy import trained
from finetune_trainer.parallel.world import World
from trainer.support import forked_ranks

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class SharedRow:
    """Describes a packed row: the model's folder, the file with its rows, and the examples in it.
    With `shares_prefixes`, a prefix that examples have in common is computed once."""

    model: Path
    rows: Path
    examples: MicroBatch
    shares_prefixes: bool = False


@dataclass(frozen=True)
class Comparison:
    """Holds the loss of a whole row and the sum of those of its parts, and of all weights the
    largest difference between the gradients relative to the gradient's largest value or 1.
    `targets` are the numbers of targets in each part, and `length` is that of the row."""

    whole: float
    divided: float
    difference: float
    weights: int
    targets: list[int]
    length: int


def tokens(model: Path, rows: Path, folder: Path) -> Split:
    """Returns the rows of a file as tokens of a model."""
    options = ReadOptions("dataset.uri", Renderer.load(model, 128), "fail")
    return splits.all_rows(token_cache.build(folder, "k", rows, options))


def compare(rows: Sequence[SharedRow], ranks: int, folder: Path) -> list[Comparison]:
    """Returns a comparison for each row, which `ranks` processes share."""
    folder.mkdir()
    codes = forked_ranks.exit_codes_in_forks(_compute, [(rows, rank, ranks, folder) for rank in range(ranks)])
    assert set(codes) == {0}, [path.read_text() for path in sorted(folder.glob("log-*"))]
    return [Comparison(**fields) for fields in json.loads((folder / "result.json").read_text())]


def _compute(rows: Sequence[SharedRow], rank: int, ranks: int, folder: Path) -> None:
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    world = groups.divide(World(rank, rank, ranks, ranks, _CPU), ranks)
    comparisons = [_compare_row(row, world) for row in rows]
    if rank == 0:
        (folder / "result.json").write_text(json.dumps([asdict(comparison) for comparison in comparisons]))
    dist.barrier()
    dist.destroy_process_group()


def _compare_row(row: SharedRow, world: World) -> Comparison:
    split, loaded = _loaded(row.model, row.rows)
    collate = Collator(True, row.shares_prefixes, False, 0, 0, _CPU)
    divided = replace(collate, sequence=world.sequence)(split, row.examples)
    whole, exact = _loss_and_gradients(loaded, collate(split, row.examples))
    loss, gradients = _loss_and_gradients(loaded, divided)
    assert gradients.keys() == exact.keys()
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    differences = [
        float((gradients[name] - gradient).abs().max() / max(1.0, float(gradient.abs().max())))
        for name, gradient in exact.items()
    ]
    assert divided.layout is not None
    return Comparison(
        whole, world.all_reduce_sum(loss)[0], max(differences), len(differences),
        world.all_gather(divided.targets.numel(), int), divided.layout.size,
    )  # fmt: skip


@cache
def _loaded(model: Path, rows: Path) -> tuple[Split, LoadedModel]:
    with tempfile.TemporaryDirectory() as folder:
        split = tokens(model, rows, Path(folder))
    return split, freezing.unfreeze(loading.load(model, dtype=torch.float32, longest=int(split.lengths.max())))


def _loss_and_gradients(loaded: LoadedModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Returns the loss and the gradients of all weights. A weight that took no part has zeros."""
    loss_sum = LossSum.of(loaded.base, None, "cpu")
    if getattr(loaded.base.config, "final_logit_softcapping", None):
        loss_sum = loss_sum.unchunked
    loaded.model.zero_grad(set_to_none=True)
    with loss_sum.packed_context(batch):
        loss = loss_sum(loaded.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in trained(loaded.model).items()
    }
    return float(loss.detach()), gradients
