"""Judges whether the folder of a base model can be used for a run, and reads its JSON files."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_trainer.errors import RunError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20
"""The size of config.json and its like; the index of the largest models has a few MiB."""
_MAX_HEADER_BYTES = 100 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file of a model. `name` is what messages call the file.

    Raises RunError(ModelInvalid) if it isn't one, or if it is larger than any such file.
    """
    if len(data) > MAX_JSON_BYTES:
        raise RunError("ModelInvalid", f"model.uri: {name} has more than {MAX_JSON_BYTES >> 20} MiB")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RunError("ModelInvalid", f"model.uri: {name} isn't JSON: {cause}"[:400]) from None
    if not isinstance(body, dict):
        raise RunError("ModelInvalid", f"model.uri: {name} isn't a JSON object")
    return body


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a model. Raises RunError(ModelInvalid)."""
    try:
        with path.open("rb") as file:
            return parse_json(file.read(MAX_JSON_BYTES + 1), path.name)
    except OSError as error:
        raise RunError("ModelInvalid", f"model.uri: {path.name} can't be read ({error.strerror})") from None


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Returns the length of a safetensors file's header, and the entry of each tensor by its name.

    Each entry has a dtype, a shape and data_offsets of the right types. Raises
    RunError(ModelInvalid).
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise RunError(
                    "ModelInvalid",
                    f"model.uri: {path.name} isn't a safetensors file: its header would have {length} bytes",
                )
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        valid = all(_is_tensor(entry) for entry in entries.values())
    except (OSError, ValueError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise RunError("ModelInvalid", f"model.uri: {path.name} isn't a safetensors file: its header can't be read")
    return length, entries


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and 0 <= number < 2**53 for number in (*shape, *offsets))


def can_be_mapped(formats: Collection[str], stored: str, *, trained: bool) -> bool:
    """Returns whether every rank can use the weights as views of mapped files.

    `formats` are the number formats of all tensors, as safetensors names them, and `stored` is that
    of the base in memory. Weights that are trained are converted when a shard is copied, which is
    exact from a shorter format. A frozen base must have the right format already, because adapters
    are created for it as it is.
    """
    exact = {stored, "F16", "BF16"} if trained and stored == "F32" else {stored}
    return bool(formats) and set(formats) <= exact


def check_files(names: Collection[str], at: str) -> None:
    """Checks that a folder has a config.json and safetensors weights that Transformers reads.

    `names` are the names of its files, without those in subfolders. `at` is what messages call the
    folder. Raises RunError(ModelInvalid).
    """
    if "config.json" not in names:
        raise RunError("ModelInvalid", f"model.uri: {at} has no config.json; use the folder of a Transformers model")
    if WEIGHTS in names or WEIGHTS_INDEX in names:
        return
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        raise RunError(
            "ModelInvalid",
            f"model.uri: {at} has {others[0]}, but Transformers reads {WEIGHTS}, or the files that {WEIGHTS_INDEX} "
            "lists; use the model in Transformers' format",
        )
    pickles = sorted(name for name in names if PurePosixPath(name).suffix in _PICKLE_SUFFIXES)
    problem = (
        f"has only {', '.join(pickles[:3])}, which are pickles and never loaded; convert the weights to"
        if pickles
        else "has no weights; add them as"
    )
    raise RunError("ModelInvalid", f"model.uri: {at} {problem} *.safetensors")


def weight_files(names: Collection[str], index: bytes | None, at: str) -> tuple[str, ...]:
    """Returns the names of the weight files that Transformers would read, sorted.

    That is model.safetensors if it is among `names`, else the files that the index lists. Others,
    such as a consolidated.safetensors next to the shards, hold the same weights a second time.
    `index` is the content of the index, or None if there is none. Raises RunError(ModelInvalid) if
    the index can't be read, or if one of its files is missing.
    """
    if WEIGHTS in names:
        return (WEIGHTS,)
    try:
        shards = {str(name) for name in parse_json(index or b"", WEIGHTS_INDEX)["weight_map"].values()}
    except (RunError, KeyError, AttributeError, TypeError):
        raise RunError("ModelInvalid", f"model.uri: {at}/{WEIGHTS_INDEX} can't be read") from None
    missing = sorted(shards - set(names))
    if missing:
        raise RunError("ModelInvalid", f"model.uri: {at} lacks {missing[0]}, one of {len(shards)} weight files")
    return tuple(sorted(shards))


def check_positions(limit: int | None, longest: int, field: str) -> None:
    """Checks that a model has as many positions as the longest row has tokens.

    `limit` is the number of positions, or None if the model has no limit. `field` is the field that
    the rows come from. Raises RunError(InvalidConfig).
    """
    if limit is not None and longest > limit:
        raise RunError(
            "InvalidConfig",
            f"{field} has a row of {longest} tokens, but the model has {limit} positions; lower "
            f"dataset.maxSequenceLength to {limit}",
        )
