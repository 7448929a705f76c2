"""Brings model, data and the newest good checkpoint to this node's disk, once per node. Called by the supervisor
and, without the weights, by preflight. Never looks into rows; never writes to a store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.manifest import Manifest
from finetune_api.names import checkpoint_dir
from finetune_api.run import JobRef, Location, RunConfig
from finetune_trainer import containers, digests, inputs, licence
from finetune_trainer.destination import owned
from finetune_trainer.failure import Failed
from finetune_trainer.paths import Paths
from finetune_trainer.place import Entry, Place
from finetune_trainer.store import Access, open_file, open_files, open_folder, resolved_revision

FILES_AT_ONCE = 4
HISTORY = "history.jsonl"
CHECKPOINT_MANIFEST = "manifest.json"
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_WANTED = (".safetensors", ".json", ".jinja", ".txt", ".model")
_README = "README.md"  # names the licence
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")

Told = Callable[[str], None]
"""Gets a sentence about what is being fetched."""


@dataclass(frozen=True)
class ModelFacts:
    revision: str | None
    digest: str
    bytes: int
    license: str = licence.UNKNOWN


@dataclass(frozen=True)
class DataFacts:
    uri: str
    digest: str
    bytes: int


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint on this node's disk."""

    step: int
    folder: Path


def wanted_files(entries: tuple[Entry, ...], at: str, *, weights: bool = True) -> tuple[Entry, ...]:
    """The files of a model folder that are safe and useful, of the top folder only. Pure.

    Raises Failed(ModelNotFound) for an empty folder and Failed(ModelInvalid) for one without config.json,
    a tokenizer or safetensors weights.
    """
    if not entries:
        raise Failed("ModelNotFound", f"model.uri: there is nothing at {at}")
    top = tuple(entry for entry in entries if "/" not in entry.path)
    names = {entry.path for entry in top}
    if "config.json" not in names:
        raise Failed("ModelInvalid", f"model.uri: {at} has no config.json; give the folder of a Transformers model")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if PurePosixPath(name).suffix in _PICKLES)
        held = (
            f"only {', '.join(pickles[:3])}, and pickle files are never loaded; convert"
            if pickles
            else "no weights; add"
        )
        raise Failed("ModelInvalid", f"model.uri: {at} holds {held} the weights to *.safetensors")
    if not names & set(_TOKENIZER):
        raise Failed(
            "ModelInvalid", f"model.uri: {at} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)"
        )
    kept = [entry for entry in top if entry.path.endswith(_WANTED) or entry.path == _README]
    return tuple(entry for entry in kept if weights or not entry.path.endswith(".safetensors"))


def check_config(config: bytes, at: str) -> None:
    """Raises Failed(ModelInvalid) unless config.json names a model type and needs no code of its own."""
    try:
        body: Any = json.loads(config)
    except ValueError as error:
        raise Failed("ModelInvalid", f"model.uri: {at}/config.json is no JSON ({error})") from None
    if not isinstance(body, dict) or not isinstance(body.get("model_type"), str):
        raise Failed("ModelInvalid", f"model.uri: {at}/config.json names no model_type; is this a Transformers model?")


def model(run: RunConfig, paths: Paths, access: Access, told: Told, *, weights: bool = True) -> ModelFacts:
    """Fills `paths.model`. With `weights=False` everything but the weights, for checks."""
    location = run.model.location
    place = open_folder(location, "model", access)
    entries = place.list()
    chosen = wanted_files(entries, location.display, weights=weights)
    size = sum(entry.size for entry in chosen)
    told(f"fetching the model {location.display}: {len(chosen)} files, {size / 1e6:,.0f} MB")
    found = _download_all(place, chosen, paths.model)
    check_config((paths.model / "config.json").read_bytes(), location.display)
    index = paths.model / "model.safetensors.index.json"
    if weights and index.is_file():
        _check_shards(index, {entry.path for entry in chosen}, location.display)
    found_licence = licence.of_folder(paths.model)
    told(f"the model's licence: {found_licence}")
    asked = (("model.allowedLicenses", run.model.allowed_licenses), ("the operator", run.model.operator_licenses))
    licence.check(found_licence, asked, location.display)
    return ModelFacts(resolved_revision(place), digests.of_files(found.items()), size, found_licence)


def data(run: RunConfig, paths: Paths, access: Access, told: Told) -> dict[str, DataFacts]:
    """Fills `paths.data(split)`, or `paths.data_folder` where a split may have several files.

    Raises Failed(DatasetInvalid) for an empty file, and Failed(DatasetNotFound) where there is none.
    """
    facts: dict[str, DataFacts] = {}
    for split in inputs.splits(run.data):
        places = run.data.places(split)
        if len(places) == 1 and not inputs.is_several(places[0]):
            found, size = _one_file(places[0].location, split, paths.data(split), access, told)
            facts[split] = DataFacts(places[0].location.display, f"sha256:{found}", size)
            continue
        shutil.rmtree(paths.data_folder(split, 0).parent, ignore_errors=True)
        digests_of: dict[str, str] = {}
        size = 0
        for index, source in enumerate(places):
            folder = paths.data_folder(split, index)
            if not inputs.is_several(source):
                name = PurePosixPath(source.location.display).name
                digest, more = _one_file(source.location, split, folder / name, access, told)
                digests_of[f"{index}/{name}"] = digest
            else:
                some, more = _several(source.location, split, folder, access, told)
                digests_of |= {f"{index}/{name}": digest for name, digest in some.items()}
            size += more
        uri = ", ".join(source.location.display for source in places)
        facts[split] = DataFacts(uri, digests.of_files(digests_of.items()), size)
    return facts


def _one_file(location: Location, split: str, target: Path, access: Access, told: Told) -> tuple[str, int]:
    place, entry = open_file(location, "dataset", access)
    _refuse_empty(entry, location, split)
    told(f"fetching the {split} rows {location.display}: {entry.size / 1e6:,.1f} MB")
    return place.download(entry, target), entry.size


def _several(location: Location, split: str, folder: Path, access: Access, told: Told) -> tuple[dict[str, str], int]:
    """Of a folder, the files that are named as data; of a pattern, all that it names."""
    place, entries = open_files(location, "dataset", access)
    chosen, others = entries, 0
    if "*" not in location.uri or location.uri.endswith("/"):
        chosen = tuple(entry for entry in entries if containers.is_named_as_data(entry.path))
        others = len(entries) - len(chosen)
        if not chosen:
            endings = ", ".join(containers.SUFFIXES)
            raise Failed(
                "DatasetNotFound", f"dataset.uri: {location.display}: none of its {others} files is named {endings}"
            )
    for entry in chosen:
        _refuse_empty(entry, location, split)
    size = sum(entry.size for entry in chosen)
    left = f"; {others} other files are left alone" if others else ""
    told(f"fetching the {split} rows {location.display}: {len(chosen)} files, {size / 1e6:,.1f} MB{left}")
    return _download_all(place, chosen, folder), size


def _refuse_empty(entry: Entry, location: Location, split: str) -> None:
    if entry.size == 0:
        name = PurePosixPath(entry.path).name
        at = location.display if location.display.endswith(name) else f"{location.display}: {name}"
        raise Failed("DatasetInvalid", f"dataset: {at} ({split}) is empty")


def checkpoint(place: Place, steps: tuple[int, ...], job: JobRef, target: Path, told: Told) -> Resume | None:
    """The newest checkpoint of which every file arrives as its manifest says, in `target`; None if there is none.

    `steps` are newest first. A damaged one is left where it is and the one before is taken.
    """
    for step in steps:
        folder = checkpoint_dir(step)
        data = place.read(f"{folder}/{CHECKPOINT_MANIFEST}")
        if data is None:
            continue
        try:
            manifest = owned(data, job, place, f"{folder}/{CHECKPOINT_MANIFEST}")
        except Failed as failed:
            if "isn't a manifest" not in failed.message:
                raise
            told(f"checkpoint {folder} is left aside: its manifest can't be read")
            continue
        wrong = _fetch_checked(place, folder, manifest, target)
        if wrong is None and manifest.step == step:
            (target / CHECKPOINT_MANIFEST).write_bytes(data)
            return Resume(step, target)
        told(f"checkpoint {folder} is left aside: {wrong or f'its manifest is of step {manifest.step}'}")
    shutil.rmtree(target, ignore_errors=True)
    return None


def _fetch_checked(place: Place, folder: str, manifest: Manifest, target: Path) -> str | None:
    """Downloads what a manifest lists; the first thing that is wrong, or None."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    there = {entry.path.removeprefix(f"{folder}/"): entry for entry in place.list(folder)}
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            return f"{file.path} leads out of the folder"
        if file.path not in there:
            return f"{file.path} is missing"
        if there[file.path].size != file.size:
            return f"{file.path} has {there[file.path].size} bytes instead of {file.size}"
    found = _download_all(place, tuple(there[file.path] for file in manifest.files), target, strip=f"{folder}/")
    for file in manifest.files:
        if found[file.path] != file.sha256:
            return f"{file.path} has another sha256"
    return None


def _download_all(place: Place, entries: tuple[Entry, ...], target: Path, strip: str = "") -> dict[str, str]:
    """Several files at once; relative path → sha256."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        names = [entry.path.removeprefix(strip) for entry in entries]
        futures = [pool.submit(place.download, e, target / name) for e, name in zip(entries, names, strict=True)]
        return {name: future.result() for name, future in zip(names, futures, strict=True)}


def _check_shards(index: Path, names: set[str], at: str) -> None:
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Failed("ModelInvalid", f"model.uri: {at}/{index.name} can't be read") from None
    missing = sorted(shards - names)
    if missing:
        raise Failed("ModelInvalid", f"model.uri: {at} lacks {missing[0]} of {len(shards)} weight files")
