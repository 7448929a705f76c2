"""Builds the fake NVML library (nvml.c) with the machine's C compiler, for tests. Never shipped in an image."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("nvml.c")


def build(folder: Path) -> Path:
    """Makes `folder`/libnvidia-ml.so.1, the name that nvidia-ml-py loads, and returns the folder for
    LD_LIBRARY_PATH. Raises CalledProcessError with the compiler's words."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnvidia-ml.so.1"
    command = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(library)]
    subprocess.run([*command, str(_SOURCE)], check=True)
    return folder
