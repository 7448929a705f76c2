"""Decides whether checkpoints are sharded, and which part of every tensor each rank writes, and
writes the shards.

A shard is a safetensors file of one rank: `weights-3.safetensors` holds rank 3's part of every
trained weight, flat and in float32; so do `optimizer-3` and `best-3` for moments and best weights.
`index.json` has the full shape of each weight and says which rank has which of its values; moments
and best weights are divided in the same way. Nothing is gathered.
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

from finetune_api.base import LenientModel
from finetune_api.messages.manifest import FileEntry
from finetune_trainer import manifest
from finetune_trainer.parallel.estimate.host_memory import gib
from finetune_trainer.parallel.strategy import Extent, ShardedStrategy
from finetune_trainer.parallel.world import World

MIN_BYTES = 2**28
"""Checkpoints with fewer bytes are gathered, which is fast and gives one file that is easy to
inspect."""
_VALUE_BYTES = 12  # a weight and its two moments
_ENTRIES = TypeAdapter(tuple[FileEntry, ...])


def choose(setting: Literal["auto", "always", "never"], strategy: str, ranks: int, trained: int) -> tuple[bool, str]:
    """Returns (whether checkpoints are sharded, the reason).

    `setting` is checkpoint.shards, and `trained` is the number of trained weights.
    """
    if strategy == "ddp":
        return False, "with ddp every process holds everything, so rank 0 writes it"
    if setting != "auto":
        return setting == "always", "set by checkpoint.shards"
    if ranks == 1:
        return False, "there is only one process"
    size = trained * _VALUE_BYTES
    if size < MIN_BYTES:
        return False, f"gathering {gib(size)} is fast"
    return True, f"every process writes its own part of {gib(size)}, so none has to hold all of it"


class ShardedTensor(LenientModel):
    """Describes how one weight is divided. `parts` are (rank, offset, length), ordered by
    offset."""

    shape: tuple[int, ...]
    parts: tuple[tuple[int, int, int], ...]

    @property
    def is_incomplete(self) -> bool:
        """Whether the parts lack a value of the weight or have one twice."""
        end = 0
        for _, offset, length in self.parts:
            if offset != end or length < 0:
                return True
            end += length
        return end != math.prod(self.shape)


class Index(LenientModel):
    """Describes which rank's shard has which values. It is the same in every checkpoint of a
    run."""

    version: Literal[1] = 1
    ranks: int
    tensors: dict[str, ShardedTensor]


@dataclass(frozen=True)
class Sharding:
    """Describes how a run writes shards: the strategy whose parts they are, and their index."""

    strategy: ShardedStrategy
    index: Index


def sharding(strategy: ShardedStrategy, world: World) -> Sharding:
    """Gathers on all ranks which parts each of them holds; no values are sent.

    Raises RuntimeError if the parts don't add up to the full weights.
    """
    extents = world.all_gather(strategy.extents(), dict[str, Extent])
    tensors = {
        name: ShardedTensor(
            shape=extent.shape,
            parts=tuple(
                sorted(
                    (
                        (rank, own[name].offset, own[name].length)
                        for rank, own in enumerate(extents)
                        if own[name].length
                    ),
                    key=lambda part: part[1],
                )
            ),
        )
        for name, extent in extents[0].items()
    }
    incomplete = [name for name, tensor in tensors.items() if tensor.is_incomplete]
    if incomplete:
        name = incomplete[0]
        raise RuntimeError(f"the ranks' parts of {name} don't add up to the full weight: {tensors[name]}")
    return Sharding(strategy, Index(ranks=world.size, tensors=tensors))


def file(kind: str, rank: int) -> str:
    """Returns the file name of a rank's shard."""
    return f"{kind}-{rank}.safetensors"


def write(folder: Path, kind: str, rank: int, parts: Mapping[str, Tensor]) -> Path:
    """Writes a rank's shard, which may be empty, syncs it to disk and returns its path."""
    path = folder / file(kind, rank)
    save_file({name: part for name, part in parts.items() if part.numel()}, path)
    _sync(path)
    return path


def announce(folder: Path, rank: int, paths: tuple[Path, ...]) -> None:
    """Announces to the first rank of this node that these files are complete, together with their
    digests."""
    entries = tuple(FileEntry(path=p.name, size=p.stat().st_size, sha256=manifest.of_file(p)) for p in paths)
    partial = folder / f"{_announcement(rank)}.tmp"
    partial.write_bytes(_ENTRIES.dump_json(entries, by_alias=True))
    os.replace(partial, folder / _announcement(rank))


def collect(folder: Path, ranks: range, wait: Callable[[], None] = lambda: time.sleep(0.01)) -> tuple[FileEntry, ...]:
    """Waits for the announcements of all ranks of this node, removes them and returns their files.

    If a rank dies before it announces its files, the supervisor stops all the others too.
    """
    entries: list[FileEntry] = []
    for rank in ranks:
        announcement = folder / _announcement(rank)
        while not announcement.exists():
            wait()
        entries += _ENTRIES.validate_json(announcement.read_bytes())
        announcement.unlink()
    return tuple(entries)


def _announcement(rank: int) -> str:
    return f"rank-{rank}.json"


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
