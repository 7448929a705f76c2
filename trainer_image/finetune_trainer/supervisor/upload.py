"""Writes checkpoints and the result into the destination: first the files, then the manifest.

The result is verified after that. A storage that doesn't accept it is asked again, because
otherwise the training would have to be repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finetune_api.messages.manifest import FileEntry, Manifest
from finetune_api.messages.run import JobRef
from finetune_api.names import (
    CHECKPOINT_HISTORY,
    CHECKPOINT_MANIFEST,
    CHECKPOINTS_DIR,
    MANIFEST_PATH,
    checkpoint_dir,
)
from finetune_api.status import ArtifactStatus, CheckpointStatus
from finetune_trainer.destination import claim, output_check, shard_markers, token_store
from finetune_trainer.destination.deposit import MENDABLE, Writer
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.manifest import now_rfc3339, of_bytes
from finetune_trainer.paths import split_checkpoint_path
from finetune_trainer.storage.base import Storage
from finetune_trainer.supervisor import oom_backoff

FILES_AT_ONCE = 4
_RETRY_DELAYS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)  # seconds; the last one repeats
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Limits how long a storage is asked again, in seconds.

    `on_error` receives each failure. It also ends once `is_over` returns true.
    """

    timeout: float
    on_error: Callable[[RunError], None] = lambda error: None
    is_over: Callable[[], bool] = lambda: False


def retry(action: Callable[[], T], patience: Patience, *, name: str, log: Log) -> T:
    """Returns the result of `action`, which is retried while the storage doesn't accept it.

    That is if it doesn't answer, refuses the credentials or is full, since a person can mend all of
    these meanwhile. Other failures are raised immediately.
    """
    deadline = time.monotonic() + patience.timeout
    delays = iter(_RETRY_DELAYS)
    while True:
        try:
            return action()
        except RunError as error:
            if error.reason not in MENDABLE:
                raise
            patience.on_error(error)
            delay = next(delays, _RETRY_DELAYS[-1])
            if time.monotonic() + delay > deadline or patience.is_over():
                raise
            log.warning(f"{name} is tried again in {delay:.0f} s", reason=error.reason, detail=error.message)
            _sleep(delay, patience.is_over)


def _sleep(seconds: float, is_over: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not is_over():
        time.sleep(min(left, 0.5))


def checkpoint(
    storage: Storage,
    writer: Writer,
    folder: Path,
    history: str,
    keep: int,
    files_of_other_nodes: Callable[[int], tuple[FileEntry, ...]] = lambda step: (),
) -> CheckpointStatus:
    """Uploads a complete local checkpoint with the history so far, then keeps the newest `keep`.

    `folder` has manifest.json, which lists the other files. The uploaded manifest also lists the
    history, and the files that other nodes have uploaded; `files_of_other_nodes` is called with the
    step after this node's own files are there. Raises RunError(OutputOccupied) if another job has
    taken over the destination.
    """
    claim.require(storage, writer.job)
    manifest = Manifest.model_validate_json((folder / CHECKPOINT_MANIFEST).read_bytes())
    remote = checkpoint_dir(manifest.step)
    history_bytes = history.encode()
    history_entry = FileEntry(path=CHECKPOINT_HISTORY, size=len(history_bytes), sha256=of_bytes(history_bytes))
    own = tuple(file for file in manifest.files if file.path != CHECKPOINT_HISTORY)
    storage.delete((f"{remote}/{CHECKPOINT_MANIFEST}",))
    _upload_all(storage, {f"{remote}/{f.path}": folder / f.path for f in own})
    complete = manifest.model_copy(update={"files": (*own, *files_of_other_nodes(manifest.step), history_entry)})
    storage.write(f"{remote}/{CHECKPOINT_HISTORY}", history_bytes)
    storage.write(f"{remote}/{CHECKPOINT_MANIFEST}", _as_bytes(writer.sign(complete)))
    prune(storage, keep)
    return checkpoint_status(storage, manifest.step)


def checkpoint_status(storage: Storage, step: int) -> CheckpointStatus:
    """Returns the status of a checkpoint that is complete in the destination now."""
    uri = f"{storage.display.rstrip('/')}/{checkpoint_dir(step)}"
    return CheckpointStatus(step=step, uri=uri, time=now_rfc3339())


def shards(storage: Storage, folder: Path, group: shard_markers.Group, node: int) -> None:
    """Uploads the shards of a node other than node 0, then its marker.

    Files that are the same on all nodes are uploaded by node 0. If the result has been published in
    the meantime, the shards aren't needed any more and are deleted.
    """
    claim.require(storage, group.job)
    manifest = Manifest.model_validate_json((folder / CHECKPOINT_MANIFEST).read_bytes())
    remote = checkpoint_dir(manifest.step)
    own = tuple(file for file in manifest.files if file.path.endswith(".safetensors"))
    _upload_all(storage, {f"{remote}/{f.path}": folder / f.path for f in own})
    shard_markers.write_marker(storage, group, manifest.step, node, own)
    if storage.head(MANIFEST_PATH) is not None:
        marker = shard_markers.path(manifest.step, node, group.job.attempt)
        storage.delete((marker, *(f"{remote}/{f.path}" for f in own)))


def prune(storage: Storage, keep: int) -> None:
    """Deletes all checkpoints before the newest `keep` complete ones, whether complete or partial.

    Newer ones are still being uploaded, by this node or another. With keep=0 all are deleted. A
    manifest is deleted before the files that it lists.
    """
    paths_by_step: dict[int, list[str]] = {}
    for entry in storage.list(CHECKPOINTS_DIR):
        if (split := split_checkpoint_path(entry.path)) is not None:
            paths_by_step.setdefault(split[0], []).append(entry.path)
    complete = [step for step, paths in paths_by_step.items() if _manifest_path(step) in paths]
    newest = set(sorted(complete)[-keep:]) if keep else set()
    obsolete = [step for step in paths_by_step if not keep or (step not in newest and step < max(newest, default=0))]
    paths = [path for step in obsolete for path in paths_by_step[step]]
    storage.delete(tuple(path for path in paths if path.endswith(f"/{CHECKPOINT_MANIFEST}")))
    storage.delete(tuple(path for path in paths if not path.endswith(f"/{CHECKPOINT_MANIFEST}")))


def publish(storage: Storage, export: Path, manifest: Manifest, job: JobRef) -> ArtifactStatus:
    """Uploads the files and creates the manifest, then verifies the manifest and all sizes.

    It can be called again after any failure. Raises RunError(OutputOccupied) if another job has
    published its result in the meantime.
    """
    data = _as_bytes(manifest)
    claim.require(storage, job)  # before a file of another job's result would be overwritten
    output_check.require_own_result(storage, job)
    _upload_all(storage, {file.path: export / file.path for file in manifest.files})
    if not storage.create(MANIFEST_PATH, data):
        output_check.require_own_result(storage, job)
        storage.write(MANIFEST_PATH, data)
    _verify(storage, manifest, data)
    return artifact(storage, manifest, data)


def artifact(storage: Storage, manifest: Manifest, data: bytes) -> ArtifactStatus:
    """Returns the status of a result whose manifest has the bytes `data`."""
    digest = f"sha256:{of_bytes(data)}"
    return ArtifactStatus(uri=storage.display, manifest_digest=digest, size_bytes=manifest.size_bytes)


def remove_checkpoints(storage: Storage, job: JobRef) -> None:
    """Deletes all checkpoints, the memory record, the tokens and the claim. It is called after
    success: from then on, the manifest says whose the destination is."""
    prune(storage, keep=0)
    oom_backoff.remove(storage)
    token_store.remove(storage)
    claim.release(storage, job)


def _verify(storage: Storage, manifest: Manifest, data: bytes) -> None:
    if storage.read(MANIFEST_PATH) != data:
        raise RunError("StorageUnavailable", f"output.uri: {storage.display}/{MANIFEST_PATH} differs after the upload")
    sizes = {entry.path: entry.size for entry in storage.list()}
    wrong = [file.path for file in manifest.files if sizes.get(file.path) != file.size]
    if wrong:
        raise RunError(
            "StorageUnavailable", f"output.uri: {storage.display}/{wrong[0]} has the wrong size after upload"
        )


def _upload_all(storage: Storage, files: dict[str, Path]) -> None:
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for future in [pool.submit(storage.upload, source, path) for path, source in files.items()]:
            future.result()


def _manifest_path(step: int) -> str:
    return f"{checkpoint_dir(step)}/{CHECKPOINT_MANIFEST}"


def _as_bytes(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode()
