"""Reads the tensors of a checkpoint one at a time or in part, so that no rank holds more of them
than it needs.

`open_kind` opens weights, moments or best weights, whether they are gathered in one file or
sharded; `BroadcastReader` sends what only rank 0 has on its disk. Files are memory-mapped, so
reading a part of a tensor costs only that part.
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

from finetune_trainer import manifest
from finetune_trainer.checkpoint import sharded
from finetune_trainer.errors import RunError
from finetune_trainer.parallel import messages
from finetune_trainer.parallel.strategy import MOMENTS, TensorSource
from finetune_trainer.parallel.world import World


class FileReader(TensorSource):
    """Reads full tensors of one kind from one file."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
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


class ShardReader(TensorSource):
    """Reads tensors of one kind from the shards in a folder. Shards that aren't read need not
    exist."""

    def __init__(self, folder: Path, index: sharded.Index, kind: str) -> None:
        self._folder = folder
        self._kind = kind
        self._weights = index.tensors
        self._files: dict[int, Any] = {}
        prefixes = [f"{moment}/" for moment in MOMENTS] if kind == "optimizer" else [""]
        self._names = {f"{prefix}{name}": name for prefix in prefixes for name in index.tensors}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._weights[self._names[name]].shape
        return self.part(name, 0, math.prod(shape)).reshape(shape)

    def part(self, name: str, offset: int, length: int) -> Tensor:
        pieces = []
        for rank, start, count in self._weights[self._names[name]].parts:
            first, last = max(offset, start), min(offset + length, start + count)
            if first < last:
                pieces.append(self._shard(rank).get_slice(name)[first - start : last - start])
        return pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0), *pieces])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _shard(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = _open(self._folder / sharded.file(self._kind, rank))
        return self._files[rank]


class BroadcastReader(TensorSource):
    """Sends rank 0's tensors to every rank. All ranks must read the same tensors in the same
    order."""

    def __init__(self, tensors: Mapping[str, Tensor], world: World) -> None:
        self._tensors = tensors
        self._world = world
        formats = {name: messages.format_of(tensor) for name, tensor in tensors.items()}
        self._formats = world.broadcast(formats, dict[str, messages.TensorFormat])

    def __getitem__(self, name: str) -> Tensor:
        device = self._world.device
        value = self._tensors[name].to(device) if self._world.is_first else messages.empty(self._formats[name], device)
        dist.broadcast(value, src=0)
        return value

    def part(self, name: str, offset: int, length: int) -> Tensor:
        return self[name].reshape(-1)[offset : offset + length]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)


def open_kind(folder: Path, kind: str) -> TensorSource | None:
    """Opens the tensors of a kind ("weights", "optimizer" or "best"). Returns None if the
    checkpoint has none of that kind.

    Raises RunError if they can't be read.
    """
    if not (folder / manifest.INDEX).is_file():
        path = folder / f"{kind}.safetensors"
        return FileReader(path) if path.is_file() else None
    if not any(folder.glob(f"{kind}-*.safetensors")):
        return None
    try:
        index = sharded.Index.model_validate_json((folder / manifest.INDEX).read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError("TrainingError", f"the checkpoint's {manifest.INDEX} can't be read: {error}") from None
    incomplete = [name for name, tensor in index.tensors.items() if tensor.is_incomplete]
    if incomplete:
        name = incomplete[0]
        raise RunError("TrainingError", f"the checkpoint's {manifest.INDEX} doesn't say where all of {name} is")
    return ShardReader(folder, index, kind)


def check_names(tensors: TensorSource, expected: Iterable[str]) -> None:
    """Checks that the tensors have the expected names.

    Raises RunError if they don't, which means that they fit another model or method.
    """
    different = sorted(tensors.keys() ^ set(expected))
    if different:
        raise RunError(
            "InvalidConfig",
            f"the checkpoint doesn't fit the model: {len(different)} weights differ, e.g. {different[0]}",
        )


def open_everywhere(folder: Path, kind: str, world: World) -> TensorSource | None:
    """Opens the tensors of a kind on all ranks, which must call it at the same time.

    If every rank has the folder on its disk, each rank reads its own; otherwise, rank 0 sends what
    it reads. Returns None if there are no such tensors.
    """
    world.barrier()  # afterwards, everything written to the folder is complete
    exists = world.all_gather(folder.is_dir(), bool)
    if all(exists):
        return open_kind(folder, kind)
    tensors = open_kind(folder, kind) if world.is_first else None
    return BroadcastReader(tensors or {}, world) if world.broadcast(tensors is not None, bool) else None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise RunError("TrainingError", f"the checkpoint's {path.name} can't be read: {error}") from None
