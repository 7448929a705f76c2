"""Reads what a weight file says of itself from a store, without its weights."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer import safetensors_header
from finetune_trainer.storage.base import FileInfo, Storage

_START_BYTES = 64


def write(storage: Storage, entry: FileInfo, target: Path) -> None:
    """Writes the header of a safetensors file to `target`, and a hole of the size of its weights.

    Raises RunError(ModelInvalid) for a file that isn't one of safetensors.
    """
    start = storage.read_range(entry, 0, _START_BYTES)
    length = safetensors_header.length(entry.path, start, entry.size)
    begin = safetensors_header.LENGTH_BYTES
    header = storage.read_range(entry, begin, begin + length)
    safetensors_header.check_formats(entry.path, safetensors_header.parse(entry.path, header, entry.size))
    target.unlink(missing_ok=True)  # it may be a link to a volume's file, from an earlier download
    with target.open("wb") as file:
        file.write(start[:begin] + header)
        file.truncate(entry.size)
