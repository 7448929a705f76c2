"""Merges base and adapter into one model, one tensor at a time, so that memory never holds more
than one tensor of the base.

It reads and writes the base's safetensors files. Names, number formats and ties stay those of the
base, and a tensor that the adapter doesn't change is copied byte by byte. Before training, `check`
detects what can't be merged.
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

from finetune_trainer import safetensors_header
from finetune_trainer.errors import RunError

FOLDER = "merged"
SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PREFIX = "base_model.model."
_PART = re.compile(r"^(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
_COPY_BYTES = 2**24  # copied at a time


@dataclass(frozen=True)
class StoredTensor:
    """Describes a tensor of a safetensors file, and which of the file's bytes it occupies."""

    name: str
    format: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    bytes: int


@dataclass
class Change:
    """Describes what an adapter does to one tensor of the base.

    It replaces the tensor, or adds scaling * B @ A; DoRA also scales each row to a magnitude.
    `parts` are the adapter's matrices by PEFT's names. If `transposed`, the layer stores its weight
    as (in, out), as GPT-2's Conv1D does.
    """

    replacement: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    transposed: bool = False

    def applied(self, weight: Tensor) -> Tensor:
        """Returns the replacement of the weight if there is one; otherwise the merged weight, in
        float32 or, if `weight` is float64, in float64."""
        if self.replacement is not None:
            return self.replacement
        exact = weight if weight.dtype == torch.float64 else weight.float()
        a, b = self.parts.get("lora_A"), self.parts.get("lora_B")
        if a is None or b is None:
            a, b = self.parts["lora_embedding_A"], self.parts["lora_embedding_B"]
            return exact + (b @ a).T * self.scaling
        delta = (b.float() @ a.float()) * self.scaling
        merged = (exact.T if self.transposed else exact) + delta
        magnitude = self.parts.get("lora_magnitude_vector")
        if magnitude is not None:
            merged = merged * (magnitude.float() / torch.linalg.norm(merged, dim=1)).view(-1, 1)
        return merged.T if self.transposed else merged


def check(base: Path, trained: Iterable[str]) -> None:
    """Checks that each trained parameter can be merged into one tensor of the base.

    `trained` are parameter names of the PEFT model. Raises RunError(InvalidConfig) if one can't be
    merged.
    """
    tensors = {tensor.name: tensor for tensor in stored_tensors(base)}
    for name in trained:
        target = _parsed(name)
        if target is not None:
            _base_tensor(target[0], tensors)


def write(
    folder: Path, base: Path, adapter: Path, heartbeat: Callable[[], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes weights, index, configuration and tokenizer to `folder`. `heartbeat` is called before
    every tensor.

    Raises RunError(InvalidConfig) if the adapter can't be merged.
    """
    from safetensors.torch import load_file

    tensors = stored_tensors(base)
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
            _write_shard(file, shard, changes, heartbeat)
    if len(shards) > 1:
        weight_map = {t.name: _shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for t in shard}
        total = sum(_size(tensor, changes) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def stored_tensors(folder: Path) -> tuple[StoredTensor, ...]:
    """Returns all tensors in a model's folder, in the order of its files."""
    names = {path.name for path in folder.glob("*.safetensors")}
    if (folder / _INDEX).is_file():
        names &= set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
    tensors = []
    for path in sorted(folder / name for name in names):
        first, entries = safetensors_header.read(path)
        tensors += [
            StoredTensor(entry.name, entry.format, entry.shape, path, first + entry.begin, entry.end - entry.begin)
            for entry in entries
        ]
    return tuple(tensors)


def _changes(
    adapter: Mapping[str, Tensor], config: Mapping[str, Any], base: Iterable[StoredTensor]
) -> dict[str, Change]:
    """Returns the changes by the base's tensor names.

    Raises RunError(InvalidConfig) unless every tensor of the adapter can be used.
    """
    tensors = {tensor.name: tensor for tensor in base}
    changes: dict[str, Change] = {}
    for name, tensor in adapter.items():
        target = _parsed(name)
        if target is None:
            raise RunError(
                "InvalidConfig",
                f"output.merge: the adapter's tensor {name} is of an unknown kind, so it can't be merged; set "
                "output.merge: false",
            )
        weight_name, part = target
        change = changes.setdefault(_base_tensor(weight_name, tensors).name, Change())
        if part is None:
            change.replacement = tensor
            continue
        change.parts[part] = tensor
        if part in ("lora_A", "lora_embedding_A"):
            change.scaling = _scaling(weight_name.removesuffix(".weight"), tensor.shape[0], config)
            change.transposed = bool(config.get("fan_in_fan_out"))
    return changes


def _scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    from peft.utils.other import get_pattern_key

    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _parsed(name: str) -> tuple[str, str | None] | None:
    """Returns (the weight's name in the model, the adapter's part of it), or None for any other
    kind of name.

    The part is None if the adapter trains the weight itself.
    """
    if not name.startswith(_PREFIX):
        return None
    inner = name.removeprefix(_PREFIX)
    match = _PART.match(inner)
    if match:
        return f"{match.group(1)}.weight", match.group(2)
    return inner.replace(".modules_to_save.default.", ".").replace(".base_layer.", "."), None


def _base_tensor(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """Returns the stored tensor of a weight.

    A file may omit the first part of a module's name (GPT-2's `transformer.`), put another part
    in front of it, or have the text part of a model that reads images under its older name.

    Raises RunError(InvalidConfig) if the weight has no tensor of its own, or one that is stored in
    a format that an adapter can't be merged into.
    """
    short = name.partition(".")[2]
    older = name.replace("model.language_model.", "language_model.model.", 1)
    matches = [tensors[key] for key in (name, short, older) if key in tensors][:1]
    matches = matches or [tensor for key, tensor in tensors.items() if key.endswith(f".{name}")]
    if len(matches) != 1:
        tied = name.endswith("lm_head.weight")
        reason = "it is tied to the embedding, which would change too" if tied else "one tensor may hold several layers"
        raise RunError(
            "InvalidConfig",
            f"output.merge: the base's files have no separate tensor for {name} ({reason}), so nothing can be merged "
            "into it; remove that layer from method.lora.targetModules, or set output.merge: false",
        )
    (tensor,) = matches
    if tensor.format not in _FORMATS:
        raise RunError(
            "InvalidConfig",
            f"output.merge: {tensor.name} is stored as {tensor.format}, and an adapter can only be merged into "
            f"{', '.join(_FORMATS)}; use a base that isn't quantized, or set output.merge: false",
        )
    return tensor


def _fit_vocabulary(config: Path, tensors: Iterable[StoredTensor], changes: Mapping[str, Change]) -> None:
    """Updates vocab_size in the configuration, since a trained embedding may have more rows than
    the base's."""
    body = json.loads(config.read_bytes())
    for tensor in tensors:
        change = changes.get(tensor.name)
        trained = change.replacement if change else None
        if trained is not None and len(trained) != tensor.shape[0] and body.get("vocab_size") == tensor.shape[0]:
            body["vocab_size"] = len(trained)
            config.write_text(json.dumps(body, indent=2) + "\n")


def _shards(tensors: Iterable[StoredTensor], changes: Mapping[str, Change], limit: int) -> list[list[StoredTensor]]:
    """Divides the tensors into files of at most `limit` bytes, in order. A larger tensor gets a
    file of its own."""
    shards: list[list[StoredTensor]] = [[]]
    free = limit
    for tensor in tensors:
        size = _size(tensor, changes)
        if size > free and shards[-1]:
            shards.append([])
            free = limit
        shards[-1].append(tensor)
        free -= size
    return shards


def _shape(tensor: StoredTensor, changes: Mapping[str, Change]) -> tuple[int, ...]:
    change = changes.get(tensor.name)
    return tuple(change.replacement.shape) if change and change.replacement is not None else tensor.shape


def _size(tensor: StoredTensor, changes: Mapping[str, Change]) -> int:
    """Returns the tensor's number of bytes after merging."""
    if tensor.name not in changes:
        return tensor.bytes
    return math.prod(_shape(tensor, changes)) * _FORMATS[tensor.format].itemsize


def _write_shard(
    out: BinaryIO, shard: Iterable[StoredTensor], changes: Mapping[str, Change], heartbeat: Callable[[], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + _size(tensor, changes)
        shape = list(_shape(tensor, changes))
        header[tensor.name] = {"dtype": tensor.format, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for tensor in shard:
        heartbeat()
        with tensor.file.open("rb") as source:
            source.seek(tensor.begin)
            if tensor.name not in changes:
                _copy(source, out, tensor.bytes)
                continue
            weight = torch.frombuffer(bytearray(source.read(tensor.bytes)), dtype=_FORMATS[tensor.format])
        merged = changes[tensor.name].applied(weight.view(tensor.shape)).to(weight.dtype).contiguous()
        out.write(merged.view(torch.uint8).numpy().tobytes())


def _copy(source: BinaryIO, out: BinaryIO, remaining: int) -> None:
    while remaining:
        data = source.read(min(remaining, _COPY_BYTES))
        out.write(data)
        remaining -= len(data)


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
