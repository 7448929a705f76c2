"""Shares the files of base models between pods, attempts and jobs, in a folder on a claim.

A model is `models/<key>`, where the key is a digest of its URI, its revision, and the sizes and
etags of its files. One pod downloads it to `partial/<key>` while it holds a lock, and renames the
folder when it is whole, so that a model that is there is complete; the others wait. The kernel
releases a lock when its process dies. A pod keeps a shared lock on each model that it uses, which
is never deleted then. Whoever can't use the cache downloads to the scratch disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from finetune_api.messages.run import CacheConfig
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FileInfo

_MARKER = ".complete.json"
_WAIT_SECONDS = 0.5
_REPORT_SECONDS = 10.0
_PATIENCE_SECONDS = 600.0  # without a byte from the pod that downloads

Download = Callable[[tuple[FileInfo, ...], Path], dict[str, str]]
"""A function that downloads files to a folder and returns the sha256 of each by its path."""

_leases: list[IO[bytes]] = []  # held until this process ends


class _Unusable(Exception):
    """Is raised if the cache can't serve a model; the message says why."""


@dataclass(frozen=True)
class CachedModel:
    """Names a model by its key, and its files by their sha256."""

    key: str
    folder: Path
    digests: dict[str, str]


def key_of(uri: str, revision: str | None, entries: tuple[FileInfo, ...]) -> str:
    """Returns the name of a model's folder: the same model at another URI has another one."""
    files = [[entry.path, entry.size, entry.etag] for entry in sorted(entries, key=lambda entry: entry.path)]
    return hashlib.sha256(json.dumps([uri, revision, files]).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Source:
    """Names the files of a model by its URI and, for the Hub, its commit."""

    uri: str
    revision: str | None
    entries: tuple[FileInfo, ...]


def linked_files(
    config: CacheConfig, source: Source, target: Path, download: Download, report: Callable[[str], None]
) -> dict[str, str] | None:
    """Fills `target` with links to a model's files in the cache. Returns the sha256 of each.

    Returns None if the cache can't be used.
    """
    cache = ModelCache(Path(config.root), config.max_bytes, report)
    cached = cache.fetch(key_of(source.uri, source.revision, source.entries), source.entries, download)
    if cached is None:
        return None
    for name in cached.digests:
        link = target / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(cached.folder / name)
    return cached.digests


class ModelCache:
    """Accesses the cache in the folder `root`, whose models have at most `max_bytes` together."""

    def __init__(self, root: Path, max_bytes: int, report: Callable[[str], None]) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._report = report

    def fetch(self, key: str, entries: tuple[FileInfo, ...], download: Download) -> CachedModel | None:
        """Returns a model from the cache, which is downloaded into it if necessary.

        Returns None, and reports why, if the cache can't be used. Raises the RunError of a download
        that fails for another reason than a full volume.
        """
        try:
            model = self._existing(key)
            if model is None:
                with self._lock(key, entries):
                    model = self._existing(key) or self._download(key, entries, download)
        except (_Unusable, OSError) as error:
            self._report(f"the model cache can't be used: {error}; downloading to the scratch disk instead")
            return None
        return model

    def _folder(self, key: str) -> Path:
        return self._root / "models" / key

    def _existing(self, key: str) -> CachedModel | None:
        """Returns a model that is there, and keeps it from being deleted.

        Its digests were computed when it was downloaded; sizes and times of modification show
        whether a file has changed since then.
        """
        folder = self._folder(key)
        if not (folder / _MARKER).is_file():
            return None
        self._lease(key)
        with contextlib.suppress(OSError, ValueError, KeyError):
            files = json.loads((folder / _MARKER).read_bytes())
            changed = [name for name, file in files.items() if _state(folder / name) != file["state"]]
            if not changed:
                with contextlib.suppress(OSError):  # of a read-only volume
                    os.utime(folder / _MARKER)
                self._report(f"the model is in the cache, in {folder}")
                return CachedModel(key, folder, {name: file["sha256"] for name, file in files.items()})
            self._report(f"{changed[0]} in the model cache has changed; the model is downloaded again")
        return None

    def _download(self, key: str, entries: tuple[FileInfo, ...], download: Download) -> CachedModel:
        """Downloads a model while this process holds its lock."""
        self._make_room(key, sum(entry.size for entry in entries))
        folder, partial = self._folder(key), self._root / "partial" / key
        for leftover in (partial, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        folder.parent.mkdir(exist_ok=True)
        try:
            digests = download(entries, partial)
        except RunError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.reason == "DiskFull":
                raise _Unusable(f"its volume is full: {error.message}") from error
            raise
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        files = {name: {"sha256": digest, "state": _state(partial / name)} for name, digest in digests.items()}
        (partial / _MARKER).write_text(json.dumps(files))
        os.rename(partial, folder)
        self._lease(key)
        return CachedModel(key, folder, digests)

    @contextlib.contextmanager
    def _lock(self, key: str, entries: tuple[FileInfo, ...]) -> Iterator[None]:
        """Holds the lock of a model; waits, with reports, while another process downloads it.

        Raises _Unusable if that process makes no progress.
        """
        total = sum(entry.size for entry in entries)
        size, since, reported = -1, time.monotonic(), 0.0
        with self._open(f"{key}.lock") as file:
            while not _locked(file, fcntl.LOCK_EX):
                now, current = time.monotonic(), _size(self._root / "partial" / key)
                size, since = (current, now) if current != size else (size, since)
                if now - since > _PATIENCE_SECONDS:
                    raise _Unusable(f"another pod has downloaded nothing for {_PATIENCE_SECONDS:.0f} s")
                if now - reported > _REPORT_SECONDS:
                    reported = now
                    self._report(
                        f"waiting for another pod, which has downloaded {current / 1e6:,.0f} of {total / 1e6:,.0f} MB "
                        "to the model cache"
                    )
                time.sleep(_WAIT_SECONDS)
            yield

    def _lease(self, key: str) -> None:
        """Takes a shared lock on a model until this process ends; a read-only volume has none."""
        with contextlib.suppress(OSError):
            file = self._open(f"{key}.use")
            if _locked(file, fcntl.LOCK_SH):
                _leases.append(file)
            else:
                file.close()
                raise _Unusable("the model is being deleted")

    def _make_room(self, key: str, needed: int) -> None:
        """Deletes models, the one that was used longest ago first, until `needed` bytes fit.

        Raises _Unusable if they don't fit next to the models that are in use.
        """
        with self._open("room.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            models = sorted((self._root / "models").glob(f"*/{_MARKER}"), key=lambda marker: marker.stat().st_mtime)
            sizes = {marker.parent: _size(marker.parent) for marker in models if marker.parent.name != key}
            used = sum(sizes.values()) + _size(self._root / "partial")
            for folder, size in sizes.items():
                if used + needed <= self._max_bytes:
                    break
                if self._delete(folder):
                    used -= size
            for partial in (self._root / "partial").glob("*"):
                size = _size(partial)
                if used + needed > self._max_bytes and partial.name != key and self._delete(partial, "lock"):
                    used -= size
        if used + needed > self._max_bytes:
            raise _Unusable(
                f"the model has {needed / 1e9:,.1f} GB, and of {self._max_bytes / 1e9:,.1f} GB {used / 1e9:,.1f} are "
                "in use"
            )

    def _delete(self, folder: Path, kind: str = "use") -> bool:
        """Deletes a folder unless a process uses it or downloads to it. Returns whether it did."""
        with self._open(f"{folder.name}.{kind}") as file:
            if not _locked(file, fcntl.LOCK_EX):
                return False
            with contextlib.suppress(OSError):
                (folder / _MARKER).unlink()  # from now on it isn't a model
            shutil.rmtree(folder)
            self._report(f"deleted {folder.name} from the model cache to make room")
            return True

    def _open(self, name: str) -> IO[bytes]:
        folder = self._root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / name).open("ab")


def _locked(file: IO[bytes], kind: int) -> bool:
    """Tries to lock a file. Returns whether it is locked now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _state(file: Path) -> list[int]:
    """Returns size and time of modification, which are cheap to compare."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _size(folder: Path) -> int:
    """Returns the bytes of all files below a folder, which other processes may be changing."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
