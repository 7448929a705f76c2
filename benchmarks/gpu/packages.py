"""Unpacks the packages that a machine without network lacks, which are wheels in FOLDER.

It uses only the standard library, since it runs before anything else can be imported.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ".gpu-carry"
# The folders of imported packages: first those of the repository, then the one of the trainer
# image, which has all of them in one folder.
SOURCES = ("operator", "trainer_image", "tests", ".")


def wheels() -> list[Path]:
    """Returns the wheels in FOLDER that this Python can use."""
    return [path for path in sorted((ROOT / FOLDER).glob("*.whl")) if fits(path.name, sys.version_info[:2])]


def fits(name: str, version: tuple[int, int]) -> bool:
    """Whether the wheel of that file name runs on that Python version. Pure.

    It does if it is pure Python, uses the stable ABI, or was built for that version.
    """
    python, abi = name.removesuffix(".whl").split("-")[-3:-1]
    this = f"cp{version[0]}{version[1]}"
    older = python.startswith("cp3") and int(python.removeprefix("cp3")) <= version[1]
    return "py3" in python.split(".") or python == this or (abi == "abi3" and older)


def unpacked(folder: Path) -> Path | None:
    """Returns a folder with all wheels unpacked, created once; None if there are no wheels."""
    carried = wheels()
    if not carried:
        return None
    key = hashlib.sha256("".join(f"{path.name} {path.stat().st_size} " for path in carried).encode()).hexdigest()[:12]
    site = folder / f"gpu-check-packages-{key}"
    if not site.is_dir():
        partial = folder / f"{site.name}.{os.getpid()}"
        for path in carried:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(partial)
        compiled(sys.executable, partial)
        partial.rename(site)
    return site


def compiled(python: str, site: Path) -> None:
    """Compiles all modules to byte code.

    Otherwise every rank would compile them again if it can't write byte code.
    """
    subprocess.run([python, "-m", "compileall", "-q", "-j", "0", str(site)], capture_output=True)


def python_path(site: Path | None) -> str:
    """Returns the PYTHONPATH of the check and its processes; `site` precedes installed packages."""
    own = [str(ROOT / source) for source in SOURCES]
    return os.pathsep.join([*_of(site), *own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


def _of(site: Path | None) -> Iterator[str]:
    if site is not None:
        yield str(site)


def code_digest() -> str:
    """Returns 12 hex digits of a SHA-256 over the trainer's source code.

    They are the same in the repository, on a machine without git, and in an image.
    """
    digest = hashlib.sha256()
    for package in ("finetune_api", "finetune_trainer"):
        folder = next((root / package for root in _roots() if (root / package).is_dir()), None)
        for path in sorted(folder.rglob("*.py")) if folder else ():
            digest.update(f"{package}/{path.relative_to(folder)}\0".encode() + path.read_bytes())  # type: ignore[arg-type]
    return digest.hexdigest()[:12]


def _roots() -> list[Path]:
    return [ROOT / source for source in SOURCES]


def bytes_carried(folder: Path) -> int:
    """Returns the size of all wheels in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.whl"))
