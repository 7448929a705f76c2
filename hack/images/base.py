"""Builds a base image without a registry: a small Debian with Python, made by debootstrap.

On the host it installs at most the packages debootstrap and buildah, and only if they are missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from images.commands import do, watch
from images.errors import ImagesError

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
PACKAGES = ("python3", "python3-venv", "ca-certificates")
# Files that neither a build nor a pod reads; licenses (copyright files) stay.
PRUNED = (
    "var/cache/apt",
    "var/cache/debconf",
    "var/lib/apt/lists",
    "var/log",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/lib/python3.11/test",
    "usr/lib/python3.11/pydoc_data",
)
KEPT_EMPTY = ("var/cache/apt/archives/partial", "var/cache/debconf", "var/lib/apt/lists/partial", "var/log")
NEEDED_BYTES = 3 << 30


def base_name() -> str:
    """Returns the local base image's name; its tag changes with what it is made of."""
    recipe = repr((SUITE, PACKAGES, PRUNED, KEPT_EMPTY)).encode()
    return f"localhost/finetune-base:{hashlib.sha256(recipe).hexdigest()[:12]}"


def make_base(cache: Path, environment: Mapping[str, str]) -> None:
    """Bootstraps, prunes and commits the image `base_name()`, in about a minute.

    The unpacked files are removed at the end. Raises ImagesError.
    """
    if os.geteuid() != 0:
        raise ImagesError(
            "the local base image needs root (debootstrap makes a Debian root file system). "
            "Run this as root, or start a Docker engine."
        )
    install_package("debootstrap")
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < NEEDED_BYTES:
        raise ImagesError(f"{cache} has {free >> 20} MiB free, but building needs {NEEDED_BYTES >> 20} MiB there.")
    with tempfile.TemporaryDirectory(prefix="base-", dir=cache) as folder:
        root = Path(folder)
        root.chmod(0o755)
        packages = ",".join(PACKAGES)
        watch(
            ["debootstrap", "--variant=minbase", f"--include={packages}", SUITE, str(root), MIRROR],
            remedy=f"Is {MIRROR} reachable from here?",
        )
        prune(root)
        container = do(["buildah", "from", "scratch"], environment)
        try:
            do(["buildah", "add", "--quiet", container, str(root), "/"], environment)
            do(["buildah", "config", "--cmd", "python3", "--env", "LANG=C.UTF-8", container], environment)
            do(["buildah", "commit", "--quiet", container, base_name()], environment)
        finally:
            do(["buildah", "rm", container], environment)


def prune(root: Path) -> None:
    """Removes PRUNED and the documentation under `root`.

    Licenses and the folders that apt needs stay.
    """
    for name in PRUNED:
        shutil.rmtree(root / name, ignore_errors=True)
    for file in (root / "usr/share/doc").rglob("*"):
        if (file.is_file() or file.is_symlink()) and file.name != "copyright":
            file.unlink()
    for name in KEPT_EMPTY:
        (root / name).mkdir(parents=True, exist_ok=True)


def install_package(name: str) -> None:
    """Installs a Debian package named like its program, if that is missing.

    Raises ImagesError if it can't.
    """
    if shutil.which(name):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ImagesError(f"{name} is missing. Install it (`apt-get install {name}`), or start a Docker engine.")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    wait = ["-o", "DPkg::Lock::Timeout=300"]
    watch(["apt-get", *wait, "update", "-q"], quiet)
    watch(["apt-get", *wait, "install", "-q", "-y", "--no-install-recommends", name], quiet)
