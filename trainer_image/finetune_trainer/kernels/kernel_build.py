"""Provides the library of the compiled CPU attention, and compiles it if necessary.

The image contains the library. In a checkout, it is compiled once (two seconds) into the user's
cache. This module doesn't import torch.
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

SOURCE = Path(__file__).with_name("attention_avx512.cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared")  # the Dockerfile repeats them
_FEATURES = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"})


@lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """Returns (the library, what it was compiled for), or (None, why there is none).

    The library uses the threads of the OpenMP runtime that torch has loaded, so import torch first.
    """
    unmet = unmet_requirement()
    if unmet:
        return None, unmet
    try:
        return ctypes.CDLL(str(_library_path())), "compiled for AVX512-BF16"
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, f"it can't be compiled: {lines[-1][:200] if lines else repr(error)}"


def unmet_requirement() -> str:
    """Returns why this machine can't run the kernel, or "" if it can.

    ATEN_CPU_CAPABILITY, which limits PyTorch's own kernels, also limits this one.
    """
    capability = os.environ.get("ATEN_CPU_CAPABILITY", "avx512")
    if not capability.startswith("avx512"):
        return f"ATEN_CPU_CAPABILITY={capability} excludes AVX512-BF16"
    if platform.machine() != "x86_64" or not _cpu_features() >= _FEATURES:
        return "the CPU has no AVX512-BF16"
    return ""


def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _library_path() -> Path:
    """Returns the path of the image's library, or of the cached one, which is compiled if it is
    missing.

    Raises OSError if there is no compiler or the cache can't be written, and SubprocessError if
    compilation fails.
    """
    name = f"attention-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    shipped = SOURCE.parents[2] / name
    if shipped.is_file():
        return shipped
    cached = _cache() / name
    if cached.is_file():
        return cached
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        partial = Path(folder) / name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        partial.replace(cached)
    return cached


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator" / "kernels"
