"""What the figures were measured on, without names or paths of the machine. Called by `__main__`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")


def facts(device: str) -> dict[str, Any]:
    cpu = _cpuinfo()
    found: dict[str, Any] = {
        "cpu": cpu.get("model name", "unknown"),
        "flags": [flag for flag in _FLAGS if flag in cpu.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def warnings(threads: int) -> list[str]:
    """Why the figures may mean little."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    found = []
    if load > 0.5:
        found.append(f"the load is {load:.1f}: other work on this machine makes figures meaningless")
    if threads > cores:
        found.append(f"{threads} threads on {cores} cores")
    return found


def _cpuinfo() -> dict[str, str]:
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
