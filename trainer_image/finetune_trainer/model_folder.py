"""Judges whether the folder of a base model can be used for a run."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune_trainer import model_config
from finetune_trainer.errors import RunError

CONFIG = model_config.CONFIG
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which GPTQ, AWQ and ModelOpt describe a quantization that config.json may not have."""
_GGUF = "which is a format for inference; use the folder of the model that it was converted from"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


@dataclass(frozen=True)
class Capacity:
    """Holds how many token ids a model has embeddings for, and how many positions it has, for the
    source of an encoder-decoder and for anything else; None means any number."""

    embeddings: int
    source_positions: int | None
    positions: int | None


ANY_MODEL = Capacity(sys.maxsize, None, None)
"""The capacity of a model that hasn't been built yet, which the ranks check."""


@dataclass(frozen=True)
class RowNeeds:
    """Holds what the rows need of a model: the largest token id, and the number of tokens of the
    longest source (0 unless it is an encoder-decoder) and of the longest rest. `field` is what
    messages call the rows."""

    highest: int = 0
    longest_source: int = 0
    longest_rest: int = 0
    field: str = "dataset"


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
        raise RunError("ModelInvalid", f"model.uri: {at} {_instead_of_a_model(names)}")
    if ADAPTER_CONFIG in names:
        raise RunError(
            "ModelInvalid",
            f"model.uri: {at} has {ADAPTER_CONFIG}, so Transformers would load an adapter with the model; merge the "
            "adapter into its base and use the result, or use the base, in a folder without that file",
        )
    quantized = next((name for name in _QUANTIZATION_FILES if name in names), None)
    if quantized is not None:
        raise RunError(
            "ModelInvalid",
            f"model.uri: {at} has {quantized}, so its weights are quantized, and can't be trained; use the model that "
            "it was made from; model.quantization: nf4 saves as much memory",
        )
    if WEIGHTS in names or WEIGHTS_INDEX in names:
        return
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        raise RunError(
            "ModelInvalid",
            f"model.uri: {at} has {others[0]}, but Transformers reads {WEIGHTS}, or the files that {WEIGHTS_INDEX} "
            "lists; use the model in Transformers' format",
        )
    gguf = next((name for name in sorted(names) if name.lower().endswith(".gguf")), None)
    if gguf is not None:
        raise RunError("ModelInvalid", f"model.uri: {at} has {gguf}, {_GGUF}")
    pickles = sorted(name for name in names if PurePosixPath(name).suffix in _PICKLE_SUFFIXES)
    problem = (
        f"has only {', '.join(pickles[:3])}, which are pickles and never loaded; convert the weights to"
        if pickles
        else "has no weights; add them as"
    )
    raise RunError("ModelInvalid", f"model.uri: {at} {problem} *.safetensors")


def holds_weights(names: Collection[str]) -> bool:
    """Returns whether a folder has weights, or an adapter, in any format; a folder with only a
    tokenizer has none."""
    suffixes = (".safetensors", ".gguf", ".onnx", *_PICKLE_SUFFIXES)
    return any(name.lower().endswith(suffixes) or name in (ADAPTER_CONFIG, WEIGHTS_INDEX) for name in names)


def _instead_of_a_model(names: Collection[str]) -> str:
    """Returns what a folder without config.json holds, with the remedy."""
    gguf = next((name for name in sorted(names) if name.lower().endswith(".gguf")), None)
    if ADAPTER_CONFIG in names:
        return (
            f"is an adapter ({ADAPTER_CONFIG} without config.json) and no model; use the base that it was trained on, "
            "or merge the adapter into it and use the result"
        )
    if gguf is not None:
        return f"has {gguf}, {_GGUF}"
    if "params.json" in names:
        return (
            "has params.json, so it is a model in the format of its publisher's own code; use its folder in "
            "Transformers' format, with config.json"
        )
    if "model_index.json" in names:
        return "is a pipeline of Diffusers (model_index.json), which generates no text; use a language model"
    return "has no config.json; use the folder of a Transformers model"


def weight_files(names: Collection[str], index: bytes | None, at: str) -> tuple[str, ...]:
    """Returns the names of the weight files that Transformers would read, sorted.

    That is model.safetensors if it is among `names`, else the files that the index lists. Others,
    such as a consolidated.safetensors next to the shards, hold the same weights a second time.
    `index` is the content of the index, or None if there is none. Raises RunError(ModelInvalid) if
    the index can't be read, or if one of its files is missing.
    """
    if WEIGHTS in names:
        return (WEIGHTS,)
    weight_map = model_config.read(WEIGHTS_INDEX, index or b"", at).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RunError(
            "ModelInvalid", f"model.uri: {at}/{WEIGHTS_INDEX} has no weight_map; use the file of the model's publisher"
        )
    shards = {str(name) for name in weight_map.values()}
    missing = sorted(shards - set(names))
    if missing:
        raise RunError("ModelInvalid", f"model.uri: {at} lacks {missing[0]}, one of {len(shards)} weight files")
    return tuple(sorted(shards))


def check_contents(folder: Path, at: str) -> None:
    """Checks the JSON files of a folder on this machine, and that none of its small files is a
    pointer of Git LFS.

    Raises RunError(ModelInvalid).
    """
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            if model_config.is_git_lfs_pointer(file.read(64)):
                raise model_config.git_lfs_error(path.name, at)
    model_config.check(model_config.read(model_config.CONFIG, (folder / model_config.CONFIG).read_bytes(), at), at)
    generation = folder / model_config.GENERATION_CONFIG
    if generation.is_file():
        model_config.check_generation(generation.read_bytes(), at)


def check_tokens(rows: int, highest: int) -> None:
    """Checks that `highest`, the largest token id of all rows, is one of the model's `rows`
    embeddings.

    Raises RunError(ModelInvalid) if it isn't.
    """
    if highest >= rows:
        raise RunError(
            "ModelInvalid",
            f"model.uri: the dataset contains token {highest} of the folder's tokenizer, but the model has only {rows} "
            "embeddings; use the tokenizer that belongs to the model, or resize the embeddings and save both",
        )


def check_rows(has: Capacity, rows: RowNeeds) -> None:
    """Raises RunError if a row has a token without an embedding, or more tokens than positions."""
    check_tokens(has.embeddings, rows.highest)
    check_positions(has.source_positions, rows.longest_source, rows.field, "a prompt")
    check_positions(has.positions, rows.longest_rest, rows.field)


def check_positions(limit: int | None, longest: int, field: str, part: str = "a row") -> None:
    """Checks that a model has as many positions as the longest row has tokens.

    `limit` is the number of positions, or None if the model has no limit. `field` is the field that
    the rows come from, and `part` what has that many tokens. Raises RunError(InvalidConfig).
    """
    if limit is not None and longest > limit:
        raise RunError(
            "InvalidConfig",
            f"{field} has {part} of {longest} tokens, but the model has {limit} positions; lower "
            f"dataset.maxSequenceLength to {limit}",
        )
