"""Manifest: the list of files with digests that is written last into an output or checkpoint folder.

A folder without a manifest that verifies is incomplete and is never loaded. Written and checked by the trainer, read
by the command line. Pure: reading and hashing files is the caller's.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finetune_api.model import LenientModel


class FileEntry(LenientModel):
    """One file, relative to the folder."""

    path: str
    size: int
    sha256: str


class ManifestJob(LenientModel):
    namespace: str
    name: str
    uid: str
    attempt: int


class Manifest(LenientModel):
    """What lies in the folder and where it came from."""

    version: Literal[1] = 1
    kind: Literal["adapter", "model", "checkpoint"]
    job: ManifestJob
    step: int
    created: str = Field(description="RFC 3339 in UTC.")
    files: tuple[FileEntry, ...]
    provenance: dict[str, Any] = Field(
        default_factory=dict,
        description="Base model (uri, revision, digest), data (uri, digest, rows), resolved configuration, image, "
        "library versions, seed.",
    )
    metrics: dict[str, float] = Field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.files)
