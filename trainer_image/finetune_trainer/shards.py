"""Checkpoints in shards: which part of every tensor each rank writes, how, and whether that is done at all.

A shard is a safetensors file of one rank: `weights-3.safetensors` holds rank 3's part of every trained weight, flat and
in float32, `optimizer-3` and `best-3` likewise. `index.json` says for each weight its whole shape and which rank has
which of its values; moments and best weights are cut alike. Nothing is gathered.
Called by `assembly` (the choice), `saving` and `best` (writing); `stored` reads.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from finetune_api.manifest import FileEntry
from finetune_api.model import LenientModel
from finetune_trainer import digests
from finetune_trainer.footprint import gib
from finetune_trainer.learner import Divided, Extent
from finetune_trainer.world import World

WORTH_BYTES = 2**28
"""Less than this is gathered: that takes a moment and leaves one file that is easy to look at."""
_VALUE_BYTES = 12  # a weight and its two moments
_ENTRIES = TypeAdapter(tuple[FileEntry, ...])


def choose(asked: Literal["auto", "always", "never"], strategy: str, ranks: int, trained: int) -> tuple[bool, str]:
    """(whether checkpoints are written in shards, why). `asked` is checkpoint.shards, `trained` counts weights."""
    if strategy == "ddp":
        return False, "under ddp every process holds everything, so the first one writes it"
    if asked != "auto":
        return asked == "always", "checkpoint.shards says so"
    if ranks == 1:
        return False, "there is one process"
    size = trained * _VALUE_BYTES
    if size < WORTH_BYTES:
        return False, f"{gib(size)} are soon gathered"
    return True, f"every process writes its own part of {gib(size)}, and none holds them all"


class Indexed(LenientModel):
    """Of one weight. `parts`: (rank, offset, length), by offset."""

    shape: tuple[int, ...]
    parts: tuple[tuple[int, int, int], ...]

    @property
    def hole(self) -> bool:
        """Whether the parts aren't the whole, each value once."""
        at = 0
        for _, offset, length in self.parts:
            if offset != at or length < 0:
                return True
            at += length
        return at != math.prod(self.shape)


class Index(LenientModel):
    """Where every value lies; the same in every checkpoint of a run."""

    version: Literal[1] = 1
    ranks: int
    tensors: dict[str, Indexed]


@dataclass(frozen=True)
class Sharding:
    """Of a run."""

    learner: Divided
    index: Index


def sharding(learner: Divided, world: World) -> Sharding:
    """All ranks tell what they hold; no values are sent."""
    held: list[dict[str, Extent]] = world.everyones(learner.extents())
    tensors = {
        name: Indexed(
            shape=extent.shape,
            parts=tuple(
                sorted(
                    ((rank, own[name].offset, own[name].length) for rank, own in enumerate(held) if own[name].length),
                    key=lambda part: part[1],
                )
            ),
        )
        for name, extent in held[0].items()
    }
    odd = [name for name, tensor in tensors.items() if tensor.hole]
    if odd:
        raise RuntimeError(f"the ranks' parts of {odd[0]} aren't the whole: {tensors[odd[0]]}")
    return Sharding(learner, Index(ranks=world.size, tensors=tensors))


def file(kind: str, rank: int) -> str:
    return f"{kind}-{rank}.safetensors"


def write(folder: Path, kind: str, rank: int, parts: Mapping[str, Tensor]) -> Path:
    """A rank's own file, synced. There may be nothing in it."""
    path = folder / file(kind, rank)
    save_file({name: part for name, part in parts.items() if part.numel()}, path)
    _sync(path)
    return path


def tell(folder: Path, rank: int, paths: tuple[Path, ...]) -> None:
    """Says to the first rank of this node that these files are complete, with their digests."""
    entries = tuple(FileEntry(path=p.name, size=p.stat().st_size, sha256=digests.of_file(p)) for p in paths)
    aside = folder / f"{_said(rank)}.tmp"
    aside.write_bytes(_ENTRIES.dump_json(entries, by_alias=True))
    os.replace(aside, folder / _said(rank))


def hear(folder: Path, ranks: range, wait: Callable[[], None] = lambda: time.sleep(0.01)) -> tuple[FileEntry, ...]:
    """What all ranks of this node told, once they have. A rank that dies never does; then the whole group is ended."""
    entries: list[FileEntry] = []
    for rank in ranks:
        while not (folder / _said(rank)).exists():
            wait()
        entries += _ENTRIES.validate_json((folder / _said(rank)).read_bytes())
        (folder / _said(rank)).unlink()
    return tuple(entries)


def _said(rank: int) -> str:
    return f"rank-{rank}.json"


def _sync(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
