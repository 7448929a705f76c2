"""Writes checkpoints and the result into the destination: files first, the manifest last, then looks again.

Called by the supervisor on node 0, and on other nodes for their shards. Trains nothing again: a store that doesn't
answer is waited for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from finetune_api.manifest import FileEntry, Manifest, ManifestJob
from finetune_api.names import CHECKPOINTS_DIR, MANIFEST_PATH, checkpoint_dir
from finetune_api.run import JobRef
from finetune_api.status import ArtifactStatus, CheckpointStatus
from finetune_trainer import digests, lesson, marks
from finetune_trainer.destination import owned
from finetune_trainer.failure import Failed
from finetune_trainer.fetch import CHECKPOINT_MANIFEST, HISTORY
from finetune_trainer.log import Log
from finetune_trainer.place import Place

FILES_AT_ONCE = 4
_WAITS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
_STEP = re.compile(rf"^{CHECKPOINTS_DIR}/step-(\d+)/")
T = TypeVar("T")


def now_text() -> str:
    """RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def patiently(action: Callable[[], T], *, what: str, patience: float, log: Log) -> T:
    """Does it again while the store doesn't answer, for `patience` seconds. Other failures are raised at once."""
    deadline = time.monotonic() + patience
    waits = iter(_WAITS)
    while True:
        try:
            return action()
        except Failed as failed:
            wait = next(waits, _WAITS[-1])
            if failed.reason != "StorageUnavailable" or time.monotonic() + wait > deadline:
                raise
            log.warning(f"{what} is tried again in {wait:.0f} s", reason=failed.reason, detail=failed.message)
            time.sleep(wait)


def checkpoint(
    place: Place,
    folder: Path,
    history: str,
    keep: int,
    others: Callable[[int], tuple[FileEntry, ...]] = lambda step: (),
) -> CheckpointStatus:
    """Uploads a complete local checkpoint with the history so far, then prunes to the newest `keep`.

    `folder` holds manifest.json, which lists the other files; the remote one lists the history too, and what the
    `others` have put there: that is asked for once our own files are.
    """
    manifest = Manifest.model_validate_json((folder / CHECKPOINT_MANIFEST).read_bytes())
    remote = checkpoint_dir(manifest.step)
    text = history.encode()
    beside = FileEntry(path=HISTORY, size=len(text), sha256=digests.of_bytes(text))
    own = tuple(file for file in manifest.files if file.path != HISTORY)
    place.delete((f"{remote}/{CHECKPOINT_MANIFEST}",))
    _upload_all(place, {f"{remote}/{f.path}": folder / f.path for f in own})
    complete = manifest.model_copy(update={"files": (*own, *others(manifest.step), beside)})
    place.write(f"{remote}/{HISTORY}", text)
    place.write(f"{remote}/{CHECKPOINT_MANIFEST}", _as_bytes(complete))
    prune(place, keep)
    return CheckpointStatus(step=manifest.step, uri=f"{place.display.rstrip('/')}/{remote}", time=now_text())


def shards(place: Place, folder: Path, job: JobRef, node: int) -> None:
    """Another node than the first: its shards of a checkpoint, then its mark. What is the same on all nodes is node
    0's. Where the result is there meanwhile, nobody needs them any more."""
    manifest = Manifest.model_validate_json((folder / CHECKPOINT_MANIFEST).read_bytes())
    remote = checkpoint_dir(manifest.step)
    own = tuple(file for file in manifest.files if file.path.endswith(".safetensors"))
    _upload_all(place, {f"{remote}/{f.path}": folder / f.path for f in own})
    marks.leave(place, job, manifest.step, node, own)
    if place.head(MANIFEST_PATH) is not None:
        place.delete((marks.path(manifest.step, node, job.attempt), *(f"{remote}/{f.path}" for f in own)))


def prune(place: Place, keep: int) -> None:
    """Removes all checkpoints before the newest `keep` complete ones, whole or not; a manifest goes before its files.

    What is newer is on its way, on this node or another. With 0, everything.
    """
    paths = [entry.path for entry in place.list(CHECKPOINTS_DIR)]
    steps = {int(match.group(1)) for match in map(_STEP.match, paths) if match}
    complete = sorted(step for step in steps if f"{checkpoint_dir(step)}/{CHECKPOINT_MANIFEST}" in paths)
    kept = set(complete[-keep:]) if keep else set()
    gone = {checkpoint_dir(step) for step in steps - kept if not keep or step < max(kept, default=0)}
    doomed = [path for path in paths if path.rpartition("/")[0] in gone or _folder(path) in gone]
    place.delete(tuple(path for path in doomed if path.endswith(f"/{CHECKPOINT_MANIFEST}")))
    place.delete(tuple(path for path in doomed if not path.endswith(f"/{CHECKPOINT_MANIFEST}")))


def result_manifest(export: Path, *, kind: str, job: JobRef, step: int, provenance: dict[str, Any],
                    metrics: dict[str, float]) -> Manifest:  # fmt: skip
    """The manifest of a finished folder: every file's sha256 and size."""
    files = tuple(
        FileEntry(path=path, size=(export / path).stat().st_size, sha256=digests.of_file(export / path))
        for path in digests.relative_files(export)
        if path != MANIFEST_PATH
    )
    return Manifest.model_validate(
        {
            "kind": kind,
            "job": ManifestJob(namespace=job.namespace, name=job.name, uid=job.uid, attempt=job.attempt),
            "step": step,
            "created": now_text(),
            "files": files,
            "provenance": provenance,
            "metrics": metrics,
        }
    )


def publish(place: Place, export: Path, manifest: Manifest, job: JobRef) -> ArtifactStatus:
    """Uploads the files, creates the manifest, reads everything's size and the manifest back.

    May be called again after any failure. Raises Failed(OutputOccupied) when another job got there first.
    """
    data = _as_bytes(manifest)
    _only_ours(place, job)  # before a file of another job's result is overwritten
    _upload_all(place, {file.path: export / file.path for file in manifest.files})
    if not place.create(MANIFEST_PATH, data):
        _only_ours(place, job)
        place.write(MANIFEST_PATH, data)
    _verify(place, manifest, data)
    return artifact(place, manifest, data)


def artifact(place: Place, manifest: Manifest, data: bytes) -> ArtifactStatus:
    """What status says of a result whose manifest is `data`."""
    digest = f"sha256:{digests.of_bytes(data)}"
    return ArtifactStatus(uri=place.display, manifest_digest=digest, size_bytes=manifest.size_bytes)


def remove_checkpoints(place: Place) -> None:
    """After success: nothing is left to resume."""
    prune(place, keep=0)
    lesson.forget(place)


def _only_ours(place: Place, job: JobRef) -> None:
    there = place.read(MANIFEST_PATH)
    if there is not None:
        owned(there, job, place, MANIFEST_PATH)


def _verify(place: Place, manifest: Manifest, data: bytes) -> None:
    if place.read(MANIFEST_PATH) != data:
        raise Failed("StorageUnavailable", f"output.uri: {place.display}/{MANIFEST_PATH} reads back differently")
    sizes = {entry.path: entry.size for entry in place.list()}
    wrong = [file.path for file in manifest.files if sizes.get(file.path) != file.size]
    if wrong:
        raise Failed("StorageUnavailable", f"output.uri: {place.display}/{wrong[0]} didn't arrive whole")


def _upload_all(place: Place, files: dict[str, Path]) -> None:
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for future in [pool.submit(place.upload, source, path) for path, source in files.items()]:
            future.result()


def _folder(path: str) -> str:
    return "/".join(path.split("/")[:2])


def _as_bytes(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode()
