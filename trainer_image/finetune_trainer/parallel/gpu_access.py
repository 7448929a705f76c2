"""Checks that a rank can use its GPU, and explains why it can't: driver, libraries, or device.

The cause is the node's and not the job's, so the message has what an administrator needs.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_trainer.errors import RunError

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_LIBRARY = "libcuda.so.1"
# The oldest driver branch for each major version of CUDA (CUDA Toolkit Release Notes, table 2:
# minor version compatibility).
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


@dataclass(frozen=True)
class Driver:
    """Describes the NVIDIA driver as a process in the pod sees it.

    `version` is that of the kernel's module, None if it isn't loaded; `library_error` says why
    libcuda can't be loaded, empty if it can.
    """

    version: str | None
    library_error: str


def require(local_rank: int) -> None:
    """Raises RunError(GpuUnavailable) if this process can't use the pod's GPU number
    `local_rank`."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank < count:
        return
    problem = f"rank {local_rank} of this pod needs a GPU of its own, and {count} can be used" if count else _problem()
    raise RunError("GpuUnavailable", explanation(problem, _driver(), torch.version.cuda))


def explanation(problem: str, driver: Driver, cuda: str | None) -> str:
    """Returns the message: what is wrong, what the node has, what is needed, and the remedy.

    `cuda` is the version that PyTorch was built for, None if it was built without. It is pure.
    """
    installed = f"driver {driver.version}" if driver.version else "no NVIDIA driver in its kernel"
    parts = [f"resources.gpu: a GPU can't be used: {problem}", f"the node has {installed}"]
    oldest = _OLDEST_DRIVER.get((cuda or "").partition(".")[0])
    if oldest is not None:
        parts.append(f"PyTorch for CUDA {cuda} needs driver {oldest} or newer")
    if driver.version and driver.library_error:
        parts.append(
            f"its libraries aren't in the container ({driver.library_error}); run the pods with NVIDIA's container "
            "runtime (pods.runtimeClassName), or mount them at /usr/local/nvidia/lib64"
        )
    elif driver.version and oldest is not None and int(driver.version.partition(".")[0]) < oldest:
        parts.append("update the driver, or keep the job off this node with pod.nodeSelector")
    else:
        parts.append("check the GPU and the driver of this node")
    return "; ".join(parts)


def driver_version(text: str) -> str | None:
    """Returns the version in the text of /proc/driver/nvidia/version; None if there is none."""
    match = re.search(r"Kernel Module\b.*?\s(\d{3,}\.\d[\d.]*)", text)
    return match.group(1) if match else None


def _problem() -> str:
    """Returns why CUDA can't be initialized, in the first sentence of PyTorch's own words."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    return "CUDA reports no device"


def _driver() -> Driver:
    version = driver_version(_KERNEL_MODULE.read_text()) if _KERNEL_MODULE.exists() else None
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        return Driver(version, str(error))
    return Driver(version, "")
