"""Defines Manifest: the list of files with digests that is written last into an output or
checkpoint folder.

A folder without a manifest that verifies is incomplete and is never loaded.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finetune_api import untrusted as u
from finetune_api.base import LenientModel


class FileEntry(LenientModel):
    """Describes one file; its path is relative to the folder."""

    path: str
    size: u.Count
    sha256: str


class ManifestJob(LenientModel):
    """Identifies the job and the attempt that wrote the folder."""

    namespace: str
    name: str
    uid: str
    attempt: u.Count


class Manifest(LenientModel):
    """Describes the content of a folder and its provenance."""

    version: Literal[1] = 1
    kind: Literal["adapter", "model", "checkpoint"]
    job: ManifestJob
    step: u.Count
    created: str = Field(description="RFC 3339 in UTC.")
    files: tuple[FileEntry, ...]
    provenance: dict[str, Any] = Field(
        default_factory=dict,
        description="Base model (uri, revision, digest), data (uri, digest, rows), resolved configuration, image, "
        "library versions and seed.",
    )
    metrics: dict[str, float] = Field(default_factory=dict)
    signature: str | None = Field(
        default=None,
        description="Ed25519 signature of everything else, by the key of the pod that wrote it. Absent if no operator "
        "vouches for the key.",
    )

    @property
    def signed_bytes(self) -> bytes:
        """What the signature covers: the manifest without it, as JSON."""
        return self.model_copy(update={"signature": None}).model_dump_json(by_alias=True, exclude_none=True).encode()

    @property
    def size_bytes(self) -> int:
        """The total size of all files, in bytes."""
        return sum(entry.size for entry in self.files)
