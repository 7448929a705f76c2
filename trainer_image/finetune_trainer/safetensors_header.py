"""Reads the header of a safetensors file: the names, number formats and shapes of its tensors.

The header is checked as a whole, so that whoever reads it gets valid entries or a RunError. The
module imports neither torch nor safetensors, and never reads a weight.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer import model_config
from finetune_trainer.errors import RunError

MAX_BYTES = 100 * 2**20
"""The largest header that safetensors reads."""
LENGTH_BYTES = 8
_MAX_DIMENSIONS = 64  # as in PyTorch; the product of many large numbers would take minutes
TRAINABLE = ("F64", "F32", "F16", "BF16")
"""The formats of weights that can be trained, or adapted."""
_PACKED = (".qweight", ".weight_packed", ".W_q", "_blocks")
"""How the names of weights end that GPTQ and AWQ, compressed-tensors, HQQ and mxfp4 pack."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Describes a tensor: its number format as safetensors names it, its shape, and the bytes after
    the header from `begin` to `end`."""

    name: str
    format: str
    shape: tuple[int, ...]
    begin: int
    end: int


def length(name: str, start: bytes, size: int) -> int:
    """Returns the length of the header of a file of `size` bytes that begins with `start`.

    Raises RunError(ModelInvalid) for a file that can't be one of safetensors.
    """
    if model_config.is_git_lfs_pointer(start):
        raise model_config.git_lfs_error(name, "the folder")
    if size == 0:
        raise _invalid(name, "is empty")
    if len(start) < LENGTH_BYTES:
        raise _invalid(name, f"has only {size} bytes")
    (value,) = struct.unpack("<Q", start[:LENGTH_BYTES])
    if value > MAX_BYTES:
        raise _invalid(name, f"isn't a safetensors file: its header would have {value} bytes")
    if value + LENGTH_BYTES > size:
        raise _invalid(name, f"is cut off: it has {size} bytes, and its header alone {value + LENGTH_BYTES}")
    return int(value)


def parse(name: str, header: bytes, size: int) -> tuple[StoredTensor, ...]:
    """Returns the tensors that a header lists, in its order. `size` is that of the whole file.

    Raises RunError(ModelInvalid) if the header isn't one, or doesn't fit the file.
    """
    try:
        entries: Any = json.loads(header)
    except (ValueError, RecursionError):
        raise _invalid(name, "isn't a safetensors file: its header isn't JSON") from None
    if not isinstance(entries, dict):
        raise _invalid(name, "isn't a safetensors file: its header isn't an object")
    tensors = tuple(_tensor(name, key, entry) for key, entry in entries.items() if key != "__metadata__")
    available = size - LENGTH_BYTES - len(header)
    end = max((tensor.end for tensor in tensors), default=0)
    if end != available:
        problem = "is cut off" if end > available else "has too many bytes"
        raise _invalid(name, f"{problem}: its tensors take {end} bytes, and the file has {available} for them")
    return tensors


def check_formats(name: str, tensors: Iterable[StoredTensor]) -> None:
    """Refuses weights whose numbers stand for others, which only the code of a quantization knows.

    Raises RunError(ModelInvalid).
    """
    for tensor in tensors:
        is_weight = (tensor.name.endswith(".weight") and len(tensor.shape) > 1) or tensor.name.endswith(_PACKED)
        if is_weight and tensor.format not in TRAINABLE:
            raise RunError(
                "ModelInvalid",
                f"model.uri: {name} stores {tensor.name[:200]} as {tensor.format}, which can't be trained; use the "
                f"model with weights in {', '.join(TRAINABLE)}; model.quantization: nf4 saves as much memory",
            )


def read(path: Path) -> tuple[int, tuple[StoredTensor, ...]]:
    """Returns (the position of the first weight, the tensors) of a file on this machine.

    Raises RunError(ModelInvalid) for a file that can't be read or isn't a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            header_length = length(path.name, start, size)
            file.seek(LENGTH_BYTES)
            header = file.read(header_length)
    except OSError as error:
        raise _invalid(path.name, f"can't be read: {error.strerror or error}") from None
    return LENGTH_BYTES + header_length, parse(path.name, header, size)


def _tensor(file: str, name: str, entry: Any) -> StoredTensor:
    try:
        number_format, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        sizes = (*shape, begin, end)
        valid = len(shape) <= _MAX_DIMENSIONS and all(type(number) is int and 0 <= number < 2**63 for number in sizes)
        valid = valid and begin <= end
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise _invalid(file, f"has a broken header: its entry for {name[:200]} can't be read")
    bits = _BITS.get(number_format)
    if bits is None:
        raise _invalid(file, f"stores {name[:200]} in the unknown format {number_format[:40]}")
    if math.prod(shape) * bits != (end - begin) * 8:
        raise _invalid(file, f"has a broken header: {name[:200]} of shape {shape} doesn't fit its {end - begin} bytes")
    return StoredTensor(name, number_format, shape, begin, end)


def _invalid(name: str, problem: str) -> RunError:
    return RunError("ModelInvalid", f"model.uri: {name} {problem}; download or upload that file again")
