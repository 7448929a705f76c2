"""Explains the Xid errors of NVIDIA's driver: what each means, and whether a program can cause it.

The meanings are those of NVIDIA's document "Xid Errors" (docs.nvidia.com/deploy/xid-errors). Which
of them are a program's is decided as in NVIDIA's device plugin for Kubernetes, which doesn't
consider a GPU unhealthy after them (k8s-device-plugin, internal/rm/health.go). It is pure.
"""

from __future__ import annotations

from typing import Literal

Origin = Literal["application", "hardware"]

_APPLICATION = {
    13: "graphics engine exception: a kernel used an invalid address or instruction",
    31: "GPU memory page fault: a kernel accessed an address that isn't mapped",
    43: "GPU stopped processing: the program's channel was reset",
    45: "preemptive cleanup after an earlier error, or because the program was killed",
    68: "video processor exception",
    109: "context switch timeout",
}
_HARDWARE = {
    32: "invalid or corrupted push buffer stream",
    38: "driver firmware error",
    46: "GPU stopped processing, and its channels couldn't be reset",
    48: "double-bit ECC error",
    61: "internal microcontroller breakpoint",
    62: "internal microcontroller halt",
    63: "a memory row or page was marked to be replaced at the next reset",
    64: "a memory row or page couldn't be marked to be replaced",
    54: "an auxiliary power connector isn't plugged in",
    69: "graphics engine class error",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high rate of single-bit ECC errors",
    94: "contained memory error: the program that used the memory was ended",
    95: "uncontained memory error: every program on the GPU is affected",
    110: "security fault",
    119: "GSP firmware didn't respond in time",
    120: "GSP firmware error",
    121: "error of the link between CPU and GPU (C2C)",
    136: "NVLink couldn't be trained",
    137: "NVLink privilege error: an access to another GPU's memory wasn't allowed",
    140: "ECC error that couldn't be recovered",
    143: "GPU initialization failure",
    **dict.fromkeys(range(144, 151), "NVLink error"),
    154: "the action that is needed to recover the GPU changed",
}
KNOWN: dict[int, tuple[Origin, str]] = {
    **{xid: ("application", meaning) for xid, meaning in _APPLICATION.items()},
    **{xid: ("hardware", meaning) for xid, meaning in _HARDWARE.items()},
}


def origin(xid: int) -> Origin:
    """Returns what caused an Xid error. One that isn't in the table counts as the hardware's."""
    return KNOWN[xid][0] if xid in KNOWN else "hardware"


def description(xid: int) -> str:
    """Returns the number with its meaning, such as `Xid 79 (GPU has fallen off the bus)`."""
    return f"Xid {xid} ({KNOWN[xid][1]})" if xid in KNOWN else f"Xid {xid}"
