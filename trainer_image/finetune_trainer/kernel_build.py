"""The compiled attention for CPUs: where its library lies, and building it where it isn't built yet.

The image holds it; a checkout builds it once (two seconds) into the user's cache. Imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("attention_kernel.cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared")  # the Dockerfile's too
_FEATURES = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"})


@lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the library, how it was had) or (None, why there is none). Threads are OpenMP's, shared with torch: import
    torch first."""
    why_not = lacking()
    if why_not:
        return None, why_not
    try:
        path = _built()
        return ctypes.CDLL(str(path)), "compiled for AVX512-BF16"
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, f"it can't be compiled: {said[-1][:200] if said else repr(error)}"


def lacking() -> str:
    """What this machine lacks for it, or nothing."""
    if platform.machine() != "x86_64" or not _features() >= _FEATURES:
        return "the CPU has no AVX512-BF16"
    return ""


def _features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _built() -> Path:
    """Raises OSError and SubprocessError."""
    name = f"attention-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    shipped = SOURCE.parents[1] / name
    if shipped.is_file():
        return shipped
    built = _cache() / name
    if built.is_file():
        return built
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        made.replace(built)
    return built


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator" / "kernels"
