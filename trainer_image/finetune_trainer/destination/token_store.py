"""Keeps the tokens of a job's rows next to its checkpoints, so that each of them is computed once.

The preflight pod renders the rows on a node without GPUs, and stores the result; the pods of each
attempt download it instead of rendering the rows while GPUs wait. What is stored is named by a
digest of everything that determines it, is signed by the preflight pod, and is deleted with the
checkpoints. It is never a reason to fail: without it, the rows are rendered again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetune_api.base import LenientModel
from finetune_api.names import CHECKPOINTS_DIR
from finetune_trainer import manifest
from finetune_trainer.destination.signing import Signer, is_signature
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FileInfo, Storage

FOLDER = f"{CHECKPOINTS_DIR}/tokens"
MIN_BYTES = 16 << 20
"""Fewer bytes are computed sooner than they are stored."""
MARKER = "complete.json"

Report = Callable[[str], None]


class _File(LenientModel):
    sha256: str
    size: int


class _Marker(LenientModel):
    """Lists the files of a folder. It is stored last, so that a folder that has it is complete."""

    job: str
    files: dict[str, _File]
    signature: str | None = None

    def signed_bytes(self, folder: str) -> bytes:
        """Returns what the signature covers: everything else, and the folder's name."""
        content = {**self.model_dump(mode="json", by_alias=True, exclude={"signature"}), "folder": folder}
        return b"tokens " + json.dumps(content, sort_keys=True).encode()


@dataclass(frozen=True)
class Origin:
    """Says whose tokens count: those of this job's uid that one of the public keys `signers` has
    signed. None means that no operator vouches for keys, so that every one of the job's counts."""

    job_uid: str
    signers: tuple[str, ...] | None

    def refusal(self, marker: _Marker, folder: str) -> str:
        """Returns why the tokens of a folder don't count; empty if they do."""
        if marker.job != self.job_uid:
            return "they are another job's"
        if self.signers is None or is_signature(marker.signature, marker.signed_bytes(folder), self.signers):
            return ""
        return "no preflight of this job has signed them"


def upload(storage: Storage, folder: Path, origin: Origin, signer: Signer, report: Report) -> bool:
    """Stores a folder with tokens under its own name, unless it is too small.

    Returns whether it is there, signed by `signer`. Tokens of an earlier preflight that count and
    are the same aren't sent again.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if size < MIN_BYTES:
        return False
    digests = {path.name: _File(sha256=manifest.of_file(path), size=path.stat().st_size) for path in files}
    try:
        before = _read(storage, folder.name)
        is_there = before is not None and before.files == digests and not origin.refusal(before, folder.name)
        for path in () if is_there else files:
            storage.upload(path, f"{FOLDER}/{folder.name}/{path.name}")
        marker = _Marker(job=origin.job_uid, files=digests)
        signed = marker.model_copy(update={"signature": signer.signature(marker.signed_bytes(folder.name))})
        storage.write(_marker_path(folder.name), signed.model_dump_json(by_alias=True).encode())
    except (RunError, OSError) as error:
        report(f"the tokens aren't stored, so the pods compute them again: {error}")
        return False
    report(f"stored {size / 1e6:,.0f} MB of tokens in {storage.display}/{FOLDER} for the training pods")
    return True


def download(storage: Storage, folder: Path, origin: Origin, report: Report) -> bool:
    """Fills a folder that doesn't exist yet with the tokens that are stored under its name.

    Returns whether it did. The folder gets its name only when every file has its digest.
    """
    partial = folder.with_name(f"{folder.name}.stored.tmp")
    try:
        marker = None if folder.exists() else _read(storage, folder.name)
        if marker is None:
            return False
        if refusal := origin.refusal(marker, folder.name):
            raise ValueError(refusal)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, file in marker.files.items():
            _download_file(storage, folder.name, name, file, partial)
        partial.rename(folder)
    except (RunError, OSError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        report(f"the stored tokens can't be used, so they are computed again: {_text(error)}")
        return False
    report(f"the tokens of the preflight are used: {folder.name}")
    return True


def remove(storage: Storage) -> None:
    """Deletes everything that is stored."""
    storage.delete(tuple(entry.path for entry in storage.list(FOLDER)))


def _read(storage: Storage, folder: str) -> _Marker | None:
    """Returns what a folder has; None if it isn't complete.

    Raises RunError for a storage that doesn't answer.
    """
    data = storage.read(_marker_path(folder))
    try:
        return _Marker.model_validate_json(data) if data else None
    except ValidationError:
        return _Marker(job="", files={})  # it is nobody's


def _marker_path(folder: str) -> str:
    return f"{FOLDER}/{folder}/{MARKER}"


def _download_file(storage: Storage, key: str, name: str, file: _File, folder: Path) -> None:
    """Raises ValueError if the file isn't the one that was stored."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no file name")
    target = folder / name
    digest = storage.download(FileInfo(f"{FOLDER}/{key}/{name}", file.size), target)
    if target.is_symlink():  # to a volume, from which the tokens are deleted at the end
        source = target.resolve()
        target.unlink()
        shutil.copyfile(source, target)
    if digest != file.sha256:
        raise ValueError(f"{name} has changed")


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
