"""Base and adapter as one model, written tensor by tensor from the base's safetensors: never more than one in memory.

`check` is called by `story` before the loop, so that what can't be merged is told before it is trained; `write` by rank
0 after the adapter was written. Names, number formats and ties stay the base's: a tensor that no adapter touches is
copied byte by byte.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from finetune_trainer.failure import Failed

FOLDER = "merged"
SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PREFIX = "base_model.model."
_PART = re.compile(r"^(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: where its bytes lie."""

    name: str
    format: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    bytes: int


@dataclass
class Change:
    """What an adapter does to one tensor of the base: replaces it, or adds scaling * B @ A, scaled to a magnitude."""

    whole: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    transposed: bool = False  # the layer keeps its weight as (in, out), as GPT-2's Conv1D does

    def applied(self, weight: Tensor) -> Tensor:
        """In float32, at least."""
        if self.whole is not None:
            return self.whole
        exact = weight if weight.dtype == torch.float64 else weight.float()
        a, b = self.parts.get("lora_A"), self.parts.get("lora_B")
        if a is None or b is None:
            a, b = self.parts["lora_embedding_A"], self.parts["lora_embedding_B"]
            return exact + (b @ a).T * self.scaling
        delta = (b.float() @ a.float()) * self.scaling
        rows = exact.T if self.transposed else exact
        new = rows + delta
        magnitude = self.parts.get("lora_magnitude_vector")
        if magnitude is not None:
            new = new * (magnitude.float() / torch.linalg.norm(new, dim=1)).view(-1, 1)
        return new.T if self.transposed else new


def check(base: Path, trained: Iterable[str]) -> None:
    """Raises Failed(InvalidConfig) unless each trained parameter of an adapter has one tensor of the base to go into.

    `trained`: parameter names of the PEFT model.
    """
    there = {tensor.name: tensor for tensor in stored(base)}
    for name in trained:
        parsed = _parsed(name)
        if parsed is not None:
            _tensor_of(parsed[0], there)


def write(folder: Path, base: Path, adapter: Path, alive: Callable[[], None], shard_bytes: int = SHARD_BYTES) -> None:
    """Fills `folder` with weights, index, config and tokenizer. `alive` is called between tensors."""
    from safetensors.torch import load_file

    tensors = stored(base)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    changes = _changes(load_file(str(adapter / "adapter_model.safetensors")), config, tensors)
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name not in (_INDEX, "README.md") and path.is_file():
            shutil.copyfile(path, folder / path.name)
    _fit_vocabulary(folder / "config.json", tensors, changes)
    shards = _shards(tensors, changes, shard_bytes)
    for number, shard in enumerate(shards, 1):
        with (folder / _shard_name(number, len(shards))).open("wb") as file:
            _write_shard(file, shard, changes, alive)
    if len(shards) > 1:
        weight_map = {t.name: _shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for t in shard}
        total = sum(_size(tensor, changes) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def stored(folder: Path) -> tuple[Stored, ...]:
    """All tensors of a model's folder, in the order of its files."""
    names = {path.name for path in folder.glob("*.safetensors")}
    if (folder / _INDEX).is_file():
        names &= set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
    found = []
    for path in sorted(folder / name for name in names):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head: dict[str, Any] = json.loads(file.read(length))
        for name, entry in head.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                found.append(Stored(name, entry["dtype"], shape, path, 8 + length + begin, end - begin))
    return tuple(found)


def _changes(adapter: Mapping[str, Tensor], config: Mapping[str, Any], base: Iterable[Stored]) -> dict[str, Change]:
    """By the base's tensor names. Nothing of the adapter may be left over."""
    there = {tensor.name: tensor for tensor in base}
    changes: dict[str, Change] = {}
    for name, tensor in adapter.items():
        parsed = _parsed(name)
        if parsed is None:
            raise Failed("InvalidConfig", f"output.merge: nothing is known of the adapter's tensor {name}")
        at, part = parsed
        change = changes.setdefault(_tensor_of(at, there).name, Change())
        if part is None:
            change.whole = tensor
            continue
        change.parts[part] = tensor
        if part in ("lora_A", "lora_embedding_A"):
            change.scaling = _scaling(at.removesuffix(".weight"), tensor.shape[0], config)
            change.transposed = bool(config.get("fan_in_fan_out"))
    return changes


def _scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    from peft.utils.other import get_pattern_key

    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _parsed(name: str) -> tuple[str, str | None] | None:
    """(the tensor's name by the model's modules, the adapter's part or None where the tensor itself is trained)"""
    if not name.startswith(_PREFIX):
        return None
    inner = name.removeprefix(_PREFIX)
    match = _PART.match(inner)
    if match:
        return f"{match.group(1)}.weight", match.group(2)
    return inner.replace(".modules_to_save.default.", ".").replace(".base_layer.", "."), None


def _tensor_of(name: str, there: Mapping[str, Stored]) -> Stored:
    """A file may leave out the first part of a module's name (GPT-2's `transformer.`), or have one more before it."""
    short = name.partition(".")[2]
    found = [there[key] for key in (name, short) if key in there][:1]
    found = found or [tensor for key, tensor in there.items() if key.endswith(f".{name}")]
    if len(found) != 1:
        tied = name.endswith("lm_head.weight")
        why = "it is tied to the embedding, which would change too" if tied else "it may hold several in one"
        raise Failed(
            "InvalidConfig",
            f"output.merge: the base's files have no tensor of its own for {name} ({why}), so nothing can be merged "
            "into it; leave that layer out of method.lora.targetModules, or set output.merge: false",
        )
    if found[0].format not in _FORMATS:
        raise Failed(
            "InvalidConfig",
            f"output.merge: {found[0].name} is stored as {found[0].format}, and an adapter can only be merged into "
            f"{', '.join(_FORMATS)}; give a base that isn't quantised, or set output.merge: false",
        )
    return found[0]


def _fit_vocabulary(config: Path, tensors: Iterable[Stored], changes: Mapping[str, Change]) -> None:
    """A trained embedding may have more rows than the base's."""
    body = json.loads(config.read_bytes())
    for tensor in tensors:
        change = changes.get(tensor.name)
        whole = change.whole if change else None
        if whole is not None and len(whole) != tensor.shape[0] and body.get("vocab_size") == tensor.shape[0]:
            body["vocab_size"] = len(whole)
            config.write_text(json.dumps(body, indent=2) + "\n")


def _shards(tensors: Iterable[Stored], changes: Mapping[str, Change], limit: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    room = limit
    for tensor in tensors:
        size = _size(tensor, changes)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= size
    return shards


def _shape(tensor: Stored, changes: Mapping[str, Change]) -> tuple[int, ...]:
    change = changes.get(tensor.name)
    return tuple(change.whole.shape) if change and change.whole is not None else tensor.shape


def _size(tensor: Stored, changes: Mapping[str, Change]) -> int:
    if tensor.name not in changes:
        return tensor.bytes
    return math.prod(_shape(tensor, changes)) * _FORMATS[tensor.format].itemsize


def _write_shard(
    out: BinaryIO, shard: Iterable[Stored], changes: Mapping[str, Change], alive: Callable[[], None]
) -> None:
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        size = _size(tensor, changes)
        head[tensor.name] = {
            "dtype": tensor.format,
            "shape": list(_shape(tensor, changes)),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for tensor in shard:
        alive()
        with tensor.file.open("rb") as source:
            source.seek(tensor.begin)
            if tensor.name not in changes:
                left = tensor.bytes
                while left:
                    piece = source.read(min(left, _AT_ONCE))
                    out.write(piece)
                    left -= len(piece)
                continue
            weight = torch.frombuffer(bytearray(source.read(tensor.bytes)), dtype=_FORMATS[tensor.format])
        new = changes[tensor.name].applied(weight.view(tensor.shape)).to(weight.dtype).contiguous()
        out.write(new.view(torch.uint8).numpy().tobytes())


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
