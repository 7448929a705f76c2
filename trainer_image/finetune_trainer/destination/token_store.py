"""Keeps the tokens of a job's rows next to its checkpoints, so that each of them is computed once.

The preflight pod renders the rows on a node without GPUs, and stores the result; the pods of each
attempt download it instead of rendering the rows while GPUs wait. What is stored is named by a
digest of everything that determines it, and is deleted with the checkpoints. It is never a reason
to fail: without it, the rows are rendered again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from finetune_api.names import CHECKPOINTS_DIR
from finetune_trainer import manifest
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FileInfo, Storage

FOLDER = f"{CHECKPOINTS_DIR}/tokens"
MIN_BYTES = 16 << 20
"""Fewer bytes are computed sooner than they are stored."""
MARKER = "complete.json"

Report = Callable[[str], None]


def upload(storage: Storage, folder: Path, job_uid: str, report: Report) -> None:
    """Stores a folder with tokens under its own name, unless it is there already or too small."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in files)
    marker = f"{FOLDER}/{folder.name}/{MARKER}"
    if size < MIN_BYTES:
        return
    try:
        if storage.head(marker) is not None:
            return
        for path in files:
            storage.upload(path, f"{FOLDER}/{folder.name}/{path.name}")
        digests = {path.name: {"sha256": manifest.of_file(path), "size": path.stat().st_size} for path in files}
        storage.write(marker, json.dumps({"job": job_uid, "files": digests}).encode())
    except (RunError, OSError) as error:
        report(f"the tokens aren't stored, so the pods compute them again: {error}")
        return
    report(f"stored {size / 1e6:,.0f} MB of tokens in {storage.display}/{FOLDER} for the training pods")


def download(storage: Storage, folder: Path, job_uid: str, report: Report) -> bool:
    """Fills a folder that doesn't exist yet with the tokens that are stored under its name.

    Returns whether it did. The folder gets its name only when every file has its digest.
    """
    partial = folder.with_name(f"{folder.name}.stored.tmp")
    try:
        data = storage.read(f"{FOLDER}/{folder.name}/{MARKER}")
        if data is None or folder.exists():
            return False
        stored = json.loads(data)
        if stored["job"] != job_uid:
            return False
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, file in stored["files"].items():
            _download_file(storage, folder.name, name, file, partial)
        partial.rename(folder)
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        report(f"the stored tokens can't be used, so they are computed again: {error}")
        return False
    report(f"the tokens of the preflight are used: {folder.name}")
    return True


def remove(storage: Storage) -> None:
    """Deletes everything that is stored."""
    storage.delete(tuple(entry.path for entry in storage.list(FOLDER)))


def _download_file(storage: Storage, key: str, name: str, file: dict[str, object], folder: Path) -> None:
    """Raises ValueError if the file isn't the one that was stored."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no file name")
    target = folder / name
    digest = storage.download(FileInfo(f"{FOLDER}/{key}/{name}", int(str(file["size"]))), target)
    if target.is_symlink():  # to a volume, from which the tokens are deleted at the end
        source = target.resolve()
        target.unlink()
        shutil.copyfile(source, target)
    if digest != file["sha256"]:
        raise ValueError(f"{name} has changed")
