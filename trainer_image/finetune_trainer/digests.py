"""sha256 of files and folders. Used by fetch, upload and the destination; knows no store and no JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def of_bytes(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """64 hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(digests: Iterable[tuple[str, str]]) -> str:
    """`sha256:…` of a folder: over its sorted (relative path, file digest) pairs, as `sha256sum` would print them."""
    whole = hashlib.sha256()
    for path, digest in sorted(digests):
        whole.update(f"{digest}  {path}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def relative_files(folder: Path) -> tuple[str, ...]:
    """All files below a folder, as sorted POSIX paths relative to it."""
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
