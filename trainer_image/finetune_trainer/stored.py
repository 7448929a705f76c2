"""Tensors on disk, read one at a time or in part, so that nobody holds more of them than it needs.

A checkpoint's weights, moments or best weights, whether gathered in one file or in shards (`open_kind`), or what only
rank 0's disk has (`FromFirst`). Files are mapped, not read: a part of a tensor costs that part. Used by `assembly`,
`best` and `undo`; the learners take from it what is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune_trainer import manifest_io, shards
from finetune_trainer.failure import Failed
from finetune_trainer.learner import MOMENTS, Stored
from finetune_trainer.world import World


class OneFile(Stored):
    """Gathered: whole tensors of any kind."""

    def __init__(self, path: Path) -> None:
        self._file = _opened(path)
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def part(self, name: str, offset: int, length: int) -> Tensor:
        return self[name].reshape(-1)[offset : offset + length]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Shards(Stored):
    """One kind of tensors in the shards of a folder. Files that no part is asked of needn't be there."""

    def __init__(self, folder: Path, index: shards.Index, kind: str) -> None:
        self._folder = folder
        self._kind = kind
        self._weights = index.tensors
        self._files: dict[int, Any] = {}
        what = [f"{moment}/" for moment in MOMENTS] if kind == "optimizer" else [""]
        self._names = {f"{prefix}{name}": name for prefix in what for name in index.tensors}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._weights[self._names[name]].shape
        return self.part(name, 0, math.prod(shape)).reshape(shape)

    def part(self, name: str, offset: int, length: int) -> Tensor:
        found = []
        for rank, start, count in self._weights[self._names[name]].parts:
            first, last = max(offset, start), min(offset + length, start + count)
            if first < last:
                found.append(self._of(rank).get_slice(name)[first - start : last - start])
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0), *found])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _of(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = _opened(self._folder / shards.file(self._kind, rank))
        return self._files[rank]


class FromFirst(Stored):
    """Rank 0's tensors for every rank, one at a time: all ranks must ask for the same ones in the same order."""

    def __init__(self, tensors: Mapping[str, Tensor], world: World) -> None:
        self._tensors = tensors
        self._world = world
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self._kinds: dict[str, tuple[torch.Size, torch.dtype]] = world.firsts(kinds)

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._kinds[name]
        device = self._world.device
        value = (
            self._tensors[name].to(device) if self._world.is_first else torch.empty(shape, dtype=dtype, device=device)
        )
        dist.broadcast(value, src=0)
        return value

    def part(self, name: str, offset: int, length: int) -> Tensor:
        return self[name].reshape(-1)[offset : offset + length]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def open_kind(folder: Path, kind: str) -> Stored | None:
    """A checkpoint's weights, optimizer or best; None where it has none of that kind."""
    if not (folder / manifest_io.INDEX).is_file():
        path = folder / f"{kind}.safetensors"
        return OneFile(path) if path.is_file() else None
    if not any(folder.glob(f"{kind}-*.safetensors")):
        return None
    try:
        index = shards.Index.model_validate_json((folder / manifest_io.INDEX).read_bytes())
    except (OSError, ValidationError) as error:
        raise Failed("TrainingError", f"the checkpoint's {manifest_io.INDEX} can't be read: {error}") from None
    odd = [name for name, tensor in index.tensors.items() if tensor.hole]
    if odd:
        raise Failed("TrainingError", f"the checkpoint's {manifest_io.INDEX} doesn't say where all of {odd[0]} is")
    return Shards(folder, index, kind)


def check_names(tensors: Stored, expected: Iterable[str]) -> None:
    """Raises Failed where other tensors are expected: the checkpoint is of another model or method."""
    odd = sorted(tensors.keys() ^ set(expected))
    if odd:
        raise Failed("InvalidConfig", f"the checkpoint doesn't fit the model: {len(odd)} weights differ, e.g. {odd[0]}")


def within_reach(folder: Path, kind: str, world: World) -> Stored | None:
    """What every rank reads itself where its own disk has the folder, and what rank 0 sends where only its disk does.

    Called by all ranks at the same time.
    """
    world.wait()  # what is being written there is complete
    here = world.everyones(folder.is_dir())
    if all(here):
        return open_kind(folder, kind)
    own = open_kind(folder, kind) if world.is_first else None
    return FromFirst(own or {}, world) if world.firsts(own is not None) else None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise Failed("TrainingError", f"the checkpoint's {path.name} can't be read: {error}") from None
