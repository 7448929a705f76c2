"""Writes all weights of a model to safetensors files, one weight at a time, so that no process
holds more than one of them in full.

Files, names, order and headers are those that Transformers writes: the files of a model that is
saved with `save_pretrained` are the same, byte for byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.model.partitioned import shape_of

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Gather = Callable[[str, torch.dtype], Tensor | None]
"""Returns a weight of the model by name, in full, in this number format and on the CPU of rank 0,
and None on the other ranks. All ranks call it at the same time."""


@dataclass(frozen=True)
class Slot:
    """Says where a tensor is stored: the bytes of a file, from `begin` on."""

    file: Path
    begin: int
    shape: tuple[int, ...]


def write(folder: Path, base: Any, gather: Gather, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the weights of `base` in the format `dtype`. Only rank 0 calls it, while the other
    ranks call `send`.

    Raises RuntimeError if a gathered weight has no values, or not the expected shape.
    """
    outlines = _outlines(base, dtype)
    stored = _stored(base, outlines)
    slots = _create_files(folder, base, stored, dtype, shard_bytes)
    for sources in _groups(base, outlines, stored):
        values = {name: _gathered(gather, name, dtype) for name in sources}
        for name, tensor in _stored(base, values).items():
            _write_tensor(slots[name], name, tensor)


def send(base: Any, gather: Gather, dtype: torch.dtype) -> None:
    """Takes part in gathering what rank 0 writes with `write`."""
    for name in _outlines(base, dtype):
        gather(name, dtype)


def header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Returns the beginning of a safetensors file with these tensors: name to (format, shape,
    bytes), in the order of the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (format_name, shape, size) in tensors.items():
        entries[name] = {"dtype": format_name, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def content(tensor: Tensor) -> Any:
    """Returns the bytes of a tensor on the CPU as a buffer, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _outlines(base: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns tensors without values for the weights that are written, by the model's names. A tied
    weight has only its first name."""
    ignored = set(getattr(base, "_keys_to_ignore_on_save", None) or ())
    return {
        name: torch.empty(tuple(shape_of(parameter)), dtype=dtype, device="meta")
        for name, parameter in base.named_parameters()
        if name not in ignored
    }


def _stored(base: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights as files store them: some families rename or join them while they are
    loaded."""
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, Tensor] = revert_weight_conversion(base, dict(weights))
    return stored


def _groups(base: Any, outlines: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> Iterable[tuple[str, ...]]:
    """Returns which weights have to be in memory at the same time to be stored: one, or all of them
    if a family stores several weights as one tensor."""
    one_by_one = {
        name: tensor.shape
        for source, outline in outlines.items()
        for name, tensor in _stored(base, {source: outline}).items()
    }
    if one_by_one == {name: tensor.shape for name, tensor in stored.items()}:
        return [(source,) for source in outlines]
    return [tuple(outlines)]


def _create_files(
    folder: Path, base: Any, stored: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int
) -> dict[str, Slot]:
    """Writes the headers of all files, and the index if there are several files."""
    format_name = next(name for name, known in FORMATS.items() if known == dtype)
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in stored.items()}
    shards = _shards(sizes, shard_bytes)
    slots: dict[str, Slot] = {}
    for number, names in enumerate(shards, 1):
        file = folder / _file_name(number, len(shards))
        shapes = {name: tuple(stored[name].shape) for name in sorted(names, key=str.encode)}
        start = header({name: (format_name, shape, sizes[name]) for name, shape in shapes.items()})
        file.write_bytes(start)
        offset = len(start)
        for name, shape in shapes.items():
            slots[name] = Slot(file, offset, shape)
            offset += sizes[name]
    if len(shards) > 1:
        parameters = sum(torch.Size(shape_of(parameter)).numel() for parameter in base.parameters())
        index = {
            "metadata": {"total_parameters": parameters, "total_size": sum(sizes.values())},
            "weight_map": {name: slot.file.name for name, slot in slots.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return slots


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Divides tensors into files of at most `limit` bytes, in their order, as Transformers does: a
    larger tensor gets a file of its own, and the file before it is filled further."""
    shards: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name, size in sizes.items():
        if size > limit:
            shards.append([name])
            continue
        if used + size > limit:
            shards.append(current)
            current, used = [], 0
        current.append(name)
        used += size
    return [*shards, current] if current else shards


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _gathered(gather: Gather, name: str, dtype: torch.dtype) -> Tensor:
    tensor = gather(name, dtype)
    if tensor is None or tensor.numel() == 0:
        raise RuntimeError(f"refusing to write empty weights ({name})")
    return tensor


def _write_tensor(slot: Slot, name: str, tensor: Tensor) -> None:
    if tuple(tensor.shape) != slot.shape:
        raise RuntimeError(f"{name} has the shape {tuple(tensor.shape)}, and {slot.shape} was expected")
    with slot.file.open("r+b") as file:
        file.seek(slot.begin)
        file.write(content(tensor))
