"""Checks that a rank can use its GPU, and explains why it can't: driver, libraries, or device.

The cause is the node's and not the job's, so the message has what an administrator needs.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_trainer.errors import RunError, sign_in

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_LIBRARY = "libcuda.so.1"
# The oldest driver branch for each major version of CUDA (CUDA Toolkit Release Notes, table 2:
# minor version compatibility).
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


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
    if local_rank >= count:
        own = f"rank {local_rank} of this pod needs a GPU of its own, and {count} can be used"
        raise RunError("GpuUnavailable", explanation(own if count else _problem(), _driver(), torch.version.cuda))
    capability = torch.cuda.get_device_capability(local_rank)
    if not is_supported(capability, torch.cuda.get_arch_list()):
        raise RunError(
            "GpuUnavailable",
            unsupported(torch.cuda.get_device_name(local_rank), capability, torch.cuda.get_arch_list()),
        )


def is_supported(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Returns whether a GPU of this compute capability runs kernels that were compiled for
    `architectures`, as PyTorch lists them. It is pure.

    Machine code (sm_80) runs on GPUs of the same major version and the same minor version or a
    higher one; intermediate code (compute_80) on all later ones. What has the suffix `a` runs on
    this version only (CUDA C++ Programming Guide, "Application Compatibility"; NVIDIA's compiler
    guide, "GPU Feature List").
    """
    for kind, major, minor, suffix in _ARCHITECTURE.findall(" ".join(architectures)):
        compiled = (int(major), int(minor))
        if suffix == "a":
            suits = compiled == capability
        elif kind == "compute" and not suffix:
            suits = compiled <= capability
        else:
            suits = compiled[0] == capability[0] and compiled <= capability
        if suits:
            return True
    return False


def unsupported(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> str:
    """Returns the message for a GPU for which PyTorch has no kernels. It is pure."""
    return (
        f"resources.gpu: {name} has compute capability {capability[0]}.{capability[1]}, and this image's PyTorch has "
        f"kernels for {', '.join(architectures)}; select nodes with other GPUs (pod.nodeSelector), or build a trainer "
        "image whose PyTorch supports this one (CUDA 12.6 for Volta and older)"
    )


def explanation(problem: str, driver: Driver, cuda: str | None) -> str:
    """Returns the message: what is wrong, what the node has, what is needed, and the remedy.

    `cuda` is the version that PyTorch was built for, None if it was built without. It is pure.
    """
    sign = sign_in(problem)
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
    elif sign is not None and sign.reason == "GpuUnavailable" and sign.remedy:
        parts.append(sign.remedy)
    else:
        parts.append("check the GPU and the driver of this node")
    return "; ".join(parts)


def driver_version(text: str) -> str | None:
    """Returns the version in the text of /proc/driver/nvidia/version; None if there is none."""
    match = re.search(r"Kernel Module\b.*?\s(\d{3,}\.\d[\d.]*)", text)
    return match.group(1) if match else None


def _problem() -> str:
    """Returns why CUDA can't be initialized, in PyTorch's own words."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return cause_in(str(error))
    return "CUDA reports no device"


def cause_in(text: str) -> str:
    """Returns what CUDA says in an error of PyTorch's: the part from its number on if it has one,
    and otherwise the first sentence. It is pure."""
    line = text.partition("\n")[0]
    numbered = re.search(r"\bError \d+: .*", line)
    return (numbered.group() if numbered else line.partition(". ")[0]).rstrip(". ")


def _driver() -> Driver:
    version = driver_version(_KERNEL_MODULE.read_text()) if _KERNEL_MODULE.exists() else None
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        return Driver(version, str(error))
    return Driver(version, "")
