"""Says whether this machine has what Triton needs to build the launcher of a kernel, which is a
small C extension of Python."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path


def missing() -> str:
    """Returns what is missing, as a sentence, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "Triton isn't installed"
    if all(shutil.which(name) is None for name in ("gcc", "cc", "clang")):
        return "there is no C compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "there is no Python.h; install python3-dev"
    return ""
