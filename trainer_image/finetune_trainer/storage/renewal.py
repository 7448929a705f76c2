"""Reads credentials again when a storage refuses them.

The keys of a Secret are rotated while a job runs: the kubelet replaces the mounted files within a
minute or two, and a client that has read them at the start would be refused for good.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FileInfo, Storage

_REFUSALS = ("AccessDenied", "CredentialsMissing")
T = TypeVar("T")
Secret = Mapping[str, str]


class RenewedStorage:
    """Accesses a storage with the credentials that `read` returns, the newest if refused.

    `open_with` opens the storage; it sends no request. It is thread-safe.
    """

    uses_scratch: ClassVar[bool] = True

    def __init__(self, open_with: Callable[[Secret], Storage], read: Callable[[], Secret]) -> None:
        self._open_with = open_with
        self._read = read
        self._lock = threading.Lock()
        self._secret = read()
        self._current = open_with(self._secret)

    @property
    def display(self) -> str:
        """The URI as the user wrote it."""
        return self._current.display

    @property
    def commit(self) -> str | None:
        """The commit of an hf:// storage; None for other schemes."""
        commit: str | None = getattr(self._current, "commit", None)
        return commit

    def list(self, under: str = "") -> tuple[FileInfo, ...]:
        """Returns all files below a sub-folder, sorted by path; none if it doesn't exist."""
        return self._accepted(lambda storage: storage.list(under))

    def head(self, path: str) -> FileInfo | None:
        """Returns a file's size and etag, or None if it doesn't exist."""
        return self._accepted(lambda storage: storage.head(path))

    def read(self, path: str) -> bytes | None:
        """Returns the content of a small file, or None if it doesn't exist."""
        return self._accepted(lambda storage: storage.read(path))

    def read_range(self, entry: FileInfo, start: int, end: int) -> bytes:
        """Returns the bytes of a file from `start` to `end`, or to its end if that comes first."""
        return self._accepted(lambda storage: storage.read_range(entry, start, end))

    def download(self, entry: FileInfo, target: Path) -> str:
        """Downloads a file and returns its sha256 (64 hex digits)."""
        return self._accepted(lambda storage: storage.download(entry, target))

    def upload(self, source: Path, path: str) -> None:
        """Stores a file, replacing an existing one."""
        self._accepted(lambda storage: storage.upload(source, path))

    def write(self, path: str, data: bytes) -> None:
        """Stores bytes as a file, replacing an existing one."""
        self._accepted(lambda storage: storage.write(path, data))

    def create(self, path: str, data: bytes) -> bool:
        """Stores bytes as a new file. Returns False, and changes nothing, if the file exists."""
        return self._accepted(lambda storage: storage.create(path, data))

    def delete(self, paths: tuple[str, ...]) -> None:
        """Deletes files; ignores those that don't exist."""
        self._accepted(lambda storage: storage.delete(paths))

    def _accepted(self, request: Callable[[Storage], T]) -> T:
        """Returns the response to a request, which is repeated once if there are new
        credentials."""
        storage = self._current
        try:
            return request(storage)
        except RunError as error:
            if error.reason not in _REFUSALS or not self._renew(storage):
                raise
        return request(self._current)

    def _renew(self, refused: Storage) -> bool:
        """Opens the storage with other credentials than `refused` had. Returns whether there are
        any."""
        with self._lock:
            if self._current is not refused:
                return True  # another thread has just done so
            secret = self._read()
            if secret == self._secret:
                return False
            self._current, self._secret = self._open_with(secret), secret
            return True
