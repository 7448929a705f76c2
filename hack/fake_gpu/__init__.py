"""Builds fake libraries of a GPU with the machine's C compiler, for tests.

They are never part of an image.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_HERE = Path(__file__).parent


def build_nvml(folder: Path, *, old_driver: bool = False) -> Path:
    """Builds `folder`/libnvidia-ml.so.1 from nvml.c, under the name that nvidia-ml-py loads.

    With `old_driver`, it lacks the functions that newer drivers have. Returns the folder, for
    LD_LIBRARY_PATH. Raises CalledProcessError if the compiler fails.
    """
    return _build(_HERE / "nvml.c", folder / "libnvidia-ml.so.1", *(["-DOLD_DRIVER"] if old_driver else []))


def build_driver(folder: Path) -> Path:
    """Builds `folder`/libcuda.so.1 from cuda.c, under the name that the CUDA runtime loads.

    Returns the folder, for LD_LIBRARY_PATH. Raises CalledProcessError if the compiler fails.
    """
    return _build(_HERE / "cuda.c", folder / "libcuda.so.1")


def _build(source: Path, library: Path, *options: str) -> Path:
    library.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(library)]
    subprocess.run([*command, *options, str(source)], check=True)
    return library.parent
