"""Defines Storage, the operations on a folder with any URI scheme. The module does no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

Role = Literal["model", "checkpoint", "dataset", "output"]

NOT_FOUND: dict[Role, str] = {
    "model": "ModelNotFound",
    "checkpoint": "CheckpointInvalid",
    "dataset": "DatasetNotFound",
    "output": "OutputNotFound",
}
FIELD: dict[Role, str] = {
    "model": "model.uri",
    "checkpoint": "model.checkpoint.uri",
    "dataset": "dataset.uri",
    "output": "output.uri",
}


@dataclass(frozen=True)
class FileInfo:
    """Describes a file: `path` is relative to the storage's folder, and `size` is in bytes."""

    path: str
    size: int
    etag: str | None = None


class Storage(Protocol):
    """Defines access to a folder on a disk, in a bucket or on a hub.

    Every method raises RunError with a reason that fits the role of the folder.
    """

    uses_scratch: ClassVar[bool]
    """Whether a download takes space on the scratch disk."""

    @property
    def display(self) -> str:
        """The URI as the user wrote it."""
        ...

    def list(self, under: str = "") -> tuple[FileInfo, ...]:
        """Returns all files below a sub-folder, sorted by path; none if it doesn't exist."""
        ...

    def head(self, path: str) -> FileInfo | None:
        """Returns a file's size and etag, or None if it doesn't exist."""
        ...

    def read(self, path: str) -> bytes | None:
        """Returns the content of a small file, or None if it doesn't exist."""
        ...

    def read_range(self, entry: FileInfo, start: int, end: int) -> bytes:
        """Returns the bytes of a file from `start` to `end`, or to its end if that comes first."""
        ...

    def download(self, entry: FileInfo, target: Path) -> str:
        """Downloads a file and returns its sha256 (64 hex digits)."""
        ...

    def upload(self, source: Path, path: str) -> None:
        """Stores a file, replacing an existing one. Never leaves a half-written file."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Stores bytes as a file, replacing an existing one."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Stores bytes as a new file. Returns False, and changes nothing, if the file exists."""
        ...

    def delete(self, paths: tuple[str, ...]) -> None:
        """Deletes files; ignores those that don't exist."""
        ...
