"""Deletes what a deleted job has left in its destination, as output.deletionPolicy says.

Only what is proven to be the job's is deleted: checkpoints and a result whose manifests name it,
and files with names of checkpoints while the destination is its own. Everything may be repeated
after a crash at any line: the claim is given back last, and a result's manifest is deleted after
its files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from finetune_api.messages.manifest import FileEntry, Manifest
from finetune_api.messages.run import JobRef, RunConfig
from finetune_api.names import (
    CHECKPOINT_MANIFEST,
    CHECKPOINTS_DIR,
    FINETUNE_DIR,
    MANIFEST_PATH,
    OWNER_PATH,
    checkpoint_dir,
)
from finetune_trainer.destination import claim, file_names, predecessor, token_store
from finetune_trainer.destination.signing import Trust
from finetune_trainer.manifest import of_bytes
from finetune_trainer.storage.base import FileInfo, Storage

_COMPARED_BYTES = 16 << 20
"""Files of a result up to this size are read before they are deleted; of larger ones, the size
counts."""
_NAMED_FILES = 3  # of those that are left

Report = Callable[[str], None]
"""A function that receives a sentence about the progress."""


@dataclass(frozen=True)
class _Content:
    """Holds what is in the destination: the files by path, and the manifests that are the job's."""

    files: Mapping[str, FileInfo]
    checkpoints: Mapping[int, Manifest]
    foreign_steps: frozenset[int]
    result: Manifest | None


def clean(storage: Storage, run: RunConfig, report: Report) -> str:
    """Deletes what the job has stored, and returns a sentence that says what that was, and what is
    left.

    Raises RunError if the storage refuses or doesn't answer; it may then be called again.
    """
    at, with_result = storage.display, run.deletion_policy == "Delete"
    owner = claim.read(storage)
    if owner is not None and owner.uid != run.job.uid:
        return f"nothing was deleted: {at} is claimed by {owner.namespace}/{owner.name} since {owner.since}"
    content = _content(storage, run)
    if owner is None and not content.checkpoints and not content.result:
        return f"nothing was deleted: there is nothing of this job in {at}"
    if owner is None:  # a job that has succeeded has given it back; nobody else may begin here meanwhile
        taker = claim.create(storage, run.job, run.recipe)
        if taker.uid != run.job.uid:
            return f"nothing was deleted: {at} is claimed by {taker.namespace}/{taker.name} since {taker.since}"
    is_own = owner is not None or content.result is not None
    report(f"deleting {len(content.checkpoints)} checkpoints in {at}")
    _delete_checkpoints(storage, content, run.job, is_own=is_own)
    deleted = [_counted(len(content.checkpoints), "checkpoint")]
    if with_result:
        if content.result is not None:
            report(f"deleting the result in {at}")
            deleted.append(_delete_result(storage, content.result, content.files))
        storage.delete(tuple(path for path in content.files if is_own and file_names.is_report(path)))
    claim.release(storage, run.job)
    return f"deleted {' and '.join(deleted)} in {at}{_rest(storage, with_result=with_result)}"


def _content(storage: Storage, run: RunConfig) -> _Content:
    """Lists the destination. A manifest is the job's if it names the job and isn't forged."""
    trust = Trust(run.signers, unrecorded=True)

    def is_own(manifest: Manifest | None) -> bool:
        return manifest is not None and manifest.job.uid == run.job.uid and trust.believes(manifest)

    manifests = predecessor.manifests(storage)
    result = predecessor.parse(storage.read(MANIFEST_PATH))
    return _Content(
        {entry.path: entry for entry in storage.list()},
        {step: manifest for step, manifest in manifests.items() if manifest is not None and is_own(manifest)},
        frozenset(step for step, manifest in manifests.items() if manifest is not None and not is_own(manifest)),
        result if is_own(result) else None,
    )


def _delete_checkpoints(storage: Storage, content: _Content, job: JobRef, *, is_own: bool) -> None:
    """Deletes the job's checkpoints, each manifest before its files. If the destination `is_own`,
    incomplete ones are the job's, too."""
    storage.delete(tuple(f"{checkpoint_dir(step)}/{CHECKPOINT_MANIFEST}" for step in content.checkpoints))
    paths = [path for path in content.files if _is_of_checkpoint(path, content, is_own=is_own)]
    if is_own:
        paths += [path for path in content.files if file_names.is_record(path) and _names(storage, path, "uid", job)]
        folders = {path.rpartition("/")[0] for path in content.files if file_names.is_of_tokens(path)}
        tokens = tuple(f for f in folders if _names(storage, f"{f}/{token_store.MARKER}", "job", job))
        paths += [path for path in content.files if path.rpartition("/")[0] in tokens]
    storage.delete(tuple(paths))


def _is_of_checkpoint(path: str, content: _Content, *, is_own: bool) -> bool:
    step = file_names.step_of(path)
    if step is None or step in content.foreign_steps:
        return False
    return is_own or step in content.checkpoints


def _delete_result(storage: Storage, manifest: Manifest, files: Mapping[str, FileInfo]) -> str:
    """Deletes the files of a result that are still the ones in its manifest, and then the manifest.

    Returns a clause that says how many that were.
    """
    own = [file for file in manifest.files if _is_unchanged(storage, file, files.get(file.path))]
    storage.delete(tuple(file.path for file in own))
    storage.delete((MANIFEST_PATH,))
    size = sum(file.size for file in own)
    return f"the result ({_counted(len(own), 'file')}, {size / 1e6:,.1f} MB)"


def _is_unchanged(storage: Storage, file: FileEntry, entry: FileInfo | None) -> bool:
    """Whether a file is the one that the job has stored; somebody may have replaced it since."""
    if entry is None or entry.size != file.size or file.path in (OWNER_PATH, MANIFEST_PATH):
        return False
    if file.size > _COMPARED_BYTES:
        return True
    data = storage.read(file.path)
    return data is not None and of_bytes(data) == file.sha256


def _names(storage: Storage, path: str, key: str, job: JobRef) -> bool:
    """Whether a file is JSON whose `key` is the uid of the job."""
    try:
        content = json.loads(storage.read(path) or b"")
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get(key) == job.uid


def _rest(storage: Storage, *, with_result: bool) -> str:
    """Returns a clause about what is left; empty if that is nothing, or what was to be left."""
    left = list(_left(storage, with_result=with_result))
    if not left:
        return ""
    more = f" and {len(left) - _NAMED_FILES} more" if len(left) > _NAMED_FILES else ""
    return f"; left are files that aren't proven to be this job's: {', '.join(left[:_NAMED_FILES])}{more}"


def _left(storage: Storage, *, with_result: bool) -> Iterator[str]:
    for entry in storage.list("" if with_result else CHECKPOINTS_DIR):
        if entry.path != f"{FINETUNE_DIR}/" and not entry.path.endswith("/"):  # folders of a console
            yield entry.path


def _counted(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
