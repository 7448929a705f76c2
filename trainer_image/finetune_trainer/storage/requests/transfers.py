"""Knows which files are being downloaded, and how much of each has arrived."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.storage.base import FileInfo, Storage

FILES_AT_ONCE = 4


@dataclass(frozen=True)
class _Transfer:
    path: str
    size: int
    target: Path

    def __str__(self) -> str:
        return f"{self.path} ({self._arrived():,} of {self.size:,} bytes)"

    def _arrived(self) -> int:
        """Returns the bytes that were written so far. A hub's client writes to a folder of its own
        first."""
        partial = [self.target, *self.target.parent.glob(f".{self.target.name}.hub/**/*.incomplete")]
        return max((path.lstat().st_size for path in partial if path.is_file()), default=0)


class Transfers:
    """Is shared by the threads that download, and one that reports what they do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, _Transfer] = {}
        self._count = 0

    def download(self, storage: Storage, entry: FileInfo, target: Path) -> str:
        """Downloads a file, and returns its sha256, as `storage.download` does."""
        with self._lock:
            self._count += 1
            number = self._count
            self._running[number] = _Transfer(entry.path, entry.size, target)
        try:
            return storage.download(entry, target)
        finally:
            with self._lock:
                del self._running[number]

    def download_all(
        self, storage: Storage, entries: tuple[FileInfo, ...], target: Path, strip: str = ""
    ) -> dict[str, str]:
        """Downloads several files at a time to the folder `target`.

        Returns the sha256 of each by its path without `strip`.
        """
        names = [entry.path.removeprefix(strip) for entry in entries]
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            futures = [
                pool.submit(self.download, storage, entry, target / name)
                for entry, name in zip(entries, names, strict=True)
            ]
            return {name: future.result() for name, future in zip(names, futures, strict=True)}

    def __str__(self) -> str:
        """Lists the files that are being downloaded, with their bytes; empty if there is none."""
        with self._lock:
            running = tuple(self._running.values())
        return ", ".join(map(str, running))
