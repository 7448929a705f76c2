"""Downloads the model, the data and the newest verified checkpoint to this node's disk.

It never looks into rows and never writes to a storage.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from finetune_api.messages.manifest import Manifest
from finetune_api.messages.run import JobRef, Location, RunConfig
from finetune_api.names import CHECKPOINT_MANIFEST, checkpoint_dir
from finetune_api.status import ModelStatus
from finetune_trainer import license as model_license
from finetune_trainer import model_folder
from finetune_trainer.data import sources
from finetune_trainer.data.reading import records
from finetune_trainer.destination.output_check import Destination, own_manifest
from finetune_trainer.destination.signing import EVERYTHING, Trust
from finetune_trainer.errors import RunError
from finetune_trainer.manifest import of_files
from finetune_trainer.paths import Paths
from finetune_trainer.storage import weights_outline
from finetune_trainer.storage.base import FileInfo, Storage
from finetune_trainer.storage.model_cache import Source, linked_files
from finetune_trainer.storage.requests.transfers import Transfers
from finetune_trainer.storage.schemes import Access, open_file, open_files, open_folder, resolved_revision

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
)  # fmt: skip
_MAX_OTHER_BYTES = 1 << 30  # tokenizers have some MiB
# Transformers would load adapter_* on top of the base.
_OTHERS = re.compile(rf"(?!adapter_).*\.(json|jinja|txt|model)|{re.escape(model_license.README)}", re.DOTALL)

Report = Callable[[str], None]
"""A function that receives a sentence about the progress."""


@dataclass(frozen=True)
class ModelFacts:
    """Describes the downloaded model. `bytes` is the size of the downloaded files, and
    `total_bytes` that of all of its files. `on_scratch` says whether they take scratch disk."""

    revision: str | None
    digest: str
    bytes: int
    license: str = model_license.UNKNOWN
    total_bytes: int = 0
    on_scratch: bool = True

    def status(self, *, complete: bool) -> ModelStatus:
        """Returns the status; the digest covers the weights, so only a complete model has one."""
        digest = self.digest if complete else None
        return ModelStatus(
            revision=self.revision, digest=digest, license=self.license, size_bytes=self.total_bytes or None
        )


@dataclass(frozen=True)
class DataFacts:
    """Describes the downloaded files of one split."""

    uri: str
    digest: str
    bytes: int


@dataclass(frozen=True)
class Resume:
    """Names a verified checkpoint on this node's disk."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Inputs:
    """Holds the destination and what was downloaded; that is nothing if the result exists."""

    storage: Storage
    destination: Destination
    model: ModelFacts | None = None
    data: dict[str, DataFacts] | None = None
    resume: Resume | None = None


def model_files(
    entries: tuple[FileInfo, ...], at: str, index: bytes | None = None
) -> tuple[tuple[FileInfo, ...], tuple[FileInfo, ...]]:
    """Returns the useful files of a model folder: weights, and others. Subfolders are left out.

    `index` is the content of model.safetensors.index.json, if the folder has one. Raises
    RunError(ModelNotFound) for an empty folder and RunError(ModelInvalid) for one without
    config.json, a tokenizer or all of its safetensors weights.
    """
    if not entries:
        raise RunError("ModelNotFound", f"model.uri: there is nothing at {at}; correct the URI")
    top = {entry.path: entry for entry in entries if "/" not in entry.path}
    model_folder.check_files(top, at)
    if not top.keys() & set(_TOKENIZER_FILES):
        raise RunError(
            "ModelInvalid", f"model.uri: {at} has no tokenizer; add tokenizer.json, tokenizer.model or vocab.json"
        )
    weights = tuple(top[name] for name in model_folder.weight_files(top, index, at))
    # The README names the license.
    others = [e for e in top.values() if _OTHERS.fullmatch(e.path)]
    for entry in others:
        if entry.size > _MAX_OTHER_BYTES:
            raise RunError("ModelInvalid", f"model.uri: {at}/{entry.path} has {entry.size >> 20} MiB; remove it")
    return weights, tuple(others)


def _check_scratch(size: int, run: RunConfig, at: str) -> None:
    """Raises RunError(InvalidConfig) if `size` bytes don't fit on the scratch disk of a pod."""
    if run.scratch_bytes is not None and size > run.scratch_bytes:
        gib = 1 << 30
        raise RunError(
            "InvalidConfig",
            f"resources.scratch is {run.scratch_bytes / gib:.1f} GiB, but the files of the model {at} alone have "
            f"{size / gib:.1f} GiB; raise it, and add room for the rows, a checkpoint and the result",
        )


def model(run: RunConfig, paths: Paths, access: Access, report: Report, *, weights: bool = True) -> ModelFacts:
    """Downloads the model to `paths.model`. With `weights=False`, only the headers of the weights
    are downloaded; their files have the right size, but take no disk space.

    Raises RunError for a model that is missing, unsuitable, or has a license that isn't allowed.
    """
    location = run.model.location
    storage = open_folder(location, "model", access)
    listed = storage.list()
    index = None
    if any(entry.path == model_folder.WEIGHTS_INDEX for entry in listed):
        index = storage.read(model_folder.WEIGHTS_INDEX)
    weight_entries, others = model_files(listed, location.display, index)
    entries = (*weight_entries, *others) if weights else others
    size = sum(entry.size for entry in (*weight_entries, *others))
    on_scratch = storage.uses_scratch and run.model_cache is None
    downloaded = sum(entry.size for entry in entries)
    report(f"downloading the model {location.display}: {len(entries)} files, {downloaded / 1e6:,.0f} MB")
    digests = None
    if weights and run.model_cache is not None and storage.uses_scratch:
        source = Source(location.uri, resolved_revision(storage), entries)
        digests = linked_files(
            run.model_cache, source, paths.model, partial(access.transfers.download_all, storage), report
        )
    if digests is None:
        if storage.uses_scratch and (weights or (on_scratch and not run.auto_scratch)):
            _check_scratch(size, run, location.display)
        digests = access.transfers.download_all(storage, entries, paths.model)
    model_folder.check_contents(paths.model, location.display)
    identifier = model_license.of_folder(paths.model)
    report(f"the model's license: {identifier}")
    policies = (("model.allowedLicenses", run.model.allowed_licenses), ("the operator", run.model.operator_licenses))
    model_license.check(identifier, policies, location.display)
    if not weights:
        for entry in weight_entries:
            weights_outline.write(storage, entry, paths.model / entry.path)
    revision, digest = resolved_revision(storage), of_files(digests.items())
    return ModelFacts(revision, digest, downloaded, identifier, size, on_scratch)


def data(run: RunConfig, paths: Paths, access: Access, report: Report) -> dict[str, DataFacts]:
    """Downloads the rows, and returns what was downloaded by split.

    The file goes to `paths.data(split)`, or to `paths.data_folder` if a split may have several
    files. Raises RunError(DatasetInvalid) for an empty file, and RunError(DatasetNotFound) if there
    is none.
    """
    facts: dict[str, DataFacts] = {}
    for split in sources.splits(run.data):
        split_sources = run.data.sources_of(split)
        if len(split_sources) == 1 and not sources.is_folder_or_pattern(split_sources[0]):
            location = split_sources[0].location
            digest, size = _download_file(location, split, paths.data(split), access, report)
            facts[split] = DataFacts(location.display, f"sha256:{digest}", size)
            continue
        shutil.rmtree(paths.data_folder(split, 0).parent, ignore_errors=True)
        digests: dict[str, str] = {}
        total_size = 0
        for index, source in enumerate(split_sources):
            folder = paths.data_folder(split, index)
            if not sources.is_folder_or_pattern(source):
                name = PurePosixPath(source.location.display).name
                digest, size = _download_file(source.location, split, folder / name, access, report)
                digests[f"{index}/{name}"] = digest
            else:
                file_digests, size = _download_files(source.location, split, folder, access, report)
                digests |= {f"{index}/{name}": digest for name, digest in file_digests.items()}
            total_size += size
        uri = ", ".join(source.location.display for source in split_sources)
        facts[split] = DataFacts(uri, of_files(digests.items()), total_size)
    return facts


def _download_file(location: Location, split: str, target: Path, access: Access, report: Report) -> tuple[str, int]:
    """Returns the sha256 and the size of the file."""
    storage, entry = open_file(location, "dataset", access)
    _refuse_empty(entry, location, split)
    report(f"downloading the {split} rows {location.display}: {entry.size / 1e6:,.1f} MB")
    return access.transfers.download(storage, entry, target), entry.size


def _download_files(
    location: Location, split: str, folder: Path, access: Access, report: Report
) -> tuple[dict[str, str], int]:
    """Downloads a folder's files that are named as data, or all files that match a pattern.

    Returns the sha256 of each file by its path, and the total size.
    """
    storage, entries = open_files(location, "dataset", access)
    chosen, ignored = entries, 0
    if "*" not in location.uri or location.uri.endswith("/"):
        chosen = tuple(entry for entry in entries if records.is_named_as_data(entry.path))
        ignored = len(entries) - len(chosen)
        if not chosen:
            suffixes = ", ".join(records.SUFFIXES)
            raise RunError(
                "DatasetNotFound", f"dataset.uri: {location.display}: none of its {ignored} files is named {suffixes}"
            )
    for entry in chosen:
        _refuse_empty(entry, location, split)
    size = sum(entry.size for entry in chosen)
    note = f"; {ignored} other files are ignored" if ignored else ""
    report(f"downloading the {split} rows {location.display}: {len(chosen)} files, {size / 1e6:,.1f} MB{note}")
    return access.transfers.download_all(storage, chosen, folder), size


def _refuse_empty(entry: FileInfo, location: Location, split: str) -> None:
    """Raises RunError(DatasetInvalid) for an empty file."""
    if entry.size == 0:
        name = PurePosixPath(entry.path).name
        at = location.display if location.display.endswith(name) else f"{location.display}: {name}"
        raise RunError("DatasetInvalid", f"dataset: {at} ({split}) is empty")


def checkpoint(
    storage: Storage, steps: tuple[int, ...], job: JobRef, target: Path, report: Report, trust: Trust = EVERYTHING
) -> Resume | None:
    """Downloads the newest undamaged checkpoint to `target`; returns None if there is none.

    `steps` are the candidates, the newest first. A checkpoint is damaged if a file differs
    from its entry in the manifest; it is left in the destination. Raises RunError(OutputOccupied)
    for a checkpoint of another job.
    """
    for step in steps:
        folder = checkpoint_dir(step)
        data = storage.read(f"{folder}/{CHECKPOINT_MANIFEST}")
        if data is None:
            continue
        manifest = own_manifest(data, job, storage)
        if manifest is None:
            report(f"checkpoint {folder} is skipped: its manifest can't be read")
            continue
        if not trust.believes(manifest):
            report(f"checkpoint {folder} is skipped: no pod of this job has signed it")
            continue
        damage = _download_verified(storage, folder, manifest, target)
        if damage is None and manifest.step == step:
            (target / CHECKPOINT_MANIFEST).write_bytes(data)
            return Resume(step, target)
        report(f"checkpoint {folder} is skipped: {damage or f'its manifest is for step {manifest.step}'}")
    shutil.rmtree(target, ignore_errors=True)
    return None


def _download_verified(storage: Storage, folder: str, manifest: Manifest, target: Path) -> str | None:
    """Downloads what a manifest lists. Returns the first damage, or None if there is none."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    entries = {entry.path.removeprefix(f"{folder}/"): entry for entry in storage.list(folder)}
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            return f"{file.path} leads out of the folder"
        if file.path not in entries:
            return f"{file.path} is missing"
        if entries[file.path].size != file.size:
            return f"{file.path} has {entries[file.path].size} bytes instead of {file.size}"
    files = tuple(entries[file.path] for file in manifest.files)
    digests = Transfers().download_all(storage, files, target, strip=f"{folder}/")
    for file in manifest.files:
        if digests[file.path] != file.sha256:
            return f"{file.path} has another sha256"
    return None
