"""Keeps Go's cache of compiled packages in memory during builds, on machines with enough of it.

A cache that is only needed until the programs are finished costs no disk traffic this way. Builds
that run at the same time share it, and the last one removes it. If a build fails or is interrupted,
its packages are copied to Go's own cache first, so that the next one goes on from there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from images.memory import available_bytes
from localcluster.locks import exclusive
from localcluster.paths import cache_root
from localcluster.toolchain import find_go

SHARED_MEMORY = Path("/dev/shm")
_GIB = 1 << 30
_BYTES = 3 * _GIB  # packages of all programs
_OTHERS = 12 * _GIB  # memory that must stay available for images, tests and the compiler itself


@contextmanager
def go_cache_in_memory(shared: Path = SHARED_MEMORY, available: int | None = None) -> Iterator[None]:
    """Sets GOCACHE to a folder in memory while the body runs.

    It does nothing if GOCACHE is set already or if there is too little memory; `available` replaces
    the bytes that the kernel reports.
    """
    folder = shared / f"finetune-operator-go-{os.getuid()}"
    if "GOCACHE" in os.environ or not _fits(folder, shared, available):
        yield
        return
    users = _join(folder)
    os.environ["GOCACHE"] = str(folder)
    try:
        yield
    except BaseException:
        del os.environ["GOCACHE"]
        _keep(folder)
        raise
    finally:
        os.environ.pop("GOCACHE", None)
        _leave(folder, users)


def _fits(folder: Path, shared: Path, available: int | None) -> bool:
    if folder.exists():
        return True  # another build uses it, or a killed one has left it
    try:
        free = shutil.disk_usage(shared).free
        return min(free - _BYTES, (available_bytes() if available is None else available) - _BYTES - _OTHERS) >= 0
    except OSError:
        return False


def _join(folder: Path) -> int:
    """Makes the folder if needed; returns a descriptor whose shared lock says that it is used."""
    with exclusive(_lock(folder), "another build that ends"):
        folder.mkdir(mode=0o700, exist_ok=True)
        users = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(users, fcntl.LOCK_SH)
    return users


def _leave(folder: Path, users: int) -> None:
    """Removes the folder if no other build uses it."""
    with exclusive(_lock(folder), "another build that begins"):
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            shutil.rmtree(folder, ignore_errors=True)
            _lock(folder).unlink(missing_ok=True)
        finally:
            os.close(users)


def _keep(folder: Path) -> None:
    """Copies the compiled packages to Go's own cache, whose files are named by their content."""
    go = str(find_go(cache_root()))
    own = subprocess.run([go, "env", "GOCACHE"], capture_output=True, text=True, check=True).stdout.strip()
    shutil.copytree(folder, own, dirs_exist_ok=True)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
