"""Describes the machine of the measurements, without its name or paths."""

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
    """Returns the machine's properties for the result file."""
    cpu = _cpuinfo()
    document: dict[str, Any] = {
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
        document["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return document


def warnings(threads: int) -> list[str]:
    """Returns the reasons why the figures may be meaningless."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    reasons = []
    if load > 0.5:
        reasons.append(f"the load is {load:.1f}: other programs on this machine make figures meaningless")
    if threads > cores:
        reasons.append(f"{threads} threads on {cores} cores")
    return reasons


def _cpuinfo() -> dict[str, str]:
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
