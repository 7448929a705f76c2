"""A file lock that the kernel releases when its holder dies."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, waiting_for: str) -> Iterator[None]:
    """Holds the lock while the body runs, which may delete the file.

    If it has to wait, it prints once on stderr what it is waiting for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(path, waiting_for)
    try:
        yield
    finally:
        os.close(handle)


def _locked(path: Path, waiting_for: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"localcluster: waiting for {waiting_for}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
            return handle
        os.close(handle)  # its last holder deleted the file: lock the new one, as others will
