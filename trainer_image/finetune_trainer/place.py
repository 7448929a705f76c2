"""Place: what a folder somewhere can do, whatever the scheme. Implemented in `store`; used by fetch, destination
and upload, which never learn which scheme they talk to. Types only, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Role = Literal["model", "dataset", "output"]

NOT_FOUND: dict[Role, str] = {"model": "ModelNotFound", "dataset": "DatasetNotFound", "output": "OutputNotFound"}
FIELD: dict[Role, str] = {"model": "model.uri", "dataset": "dataset.uri", "output": "output.uri"}


@dataclass(frozen=True)
class Entry:
    """A file of a place. `path` is relative to it."""

    path: str
    size: int
    etag: str | None = None


class Place(Protocol):
    """A folder in a store. Every method raises `failure.Failed` with a reason that fits the place's role."""

    @property
    def display(self) -> str:
        """What the user wrote."""
        ...

    def list(self, under: str = "") -> tuple[Entry, ...]:
        """All files below a sub-folder, however deep, sorted by path. An absent sub-folder is empty."""
        ...

    def head(self, path: str) -> Entry | None:
        """A file's size, or None."""
        ...

    def read(self, path: str) -> bytes | None:
        """A small file's bytes, or None."""
        ...

    def download(self, entry: Entry, target: Path) -> str:
        """Fetches a file and returns its sha256 (64 hex digits)."""
        ...

    def upload(self, source: Path, path: str) -> None:
        """Stores a file whole or not at all, overwriting."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Stores bytes, overwriting."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Stores bytes unless something is there (then False)."""
        ...

    def delete(self, paths: tuple[str, ...]) -> None:
        """Removes files; absent ones don't matter."""
        ...
