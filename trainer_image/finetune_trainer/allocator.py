"""How the C library hands out a rank's memory on the CPU. Pure; used by `ranks` for a rank's environment.

A training step asks for hundreds of tensors of some MiB and gives them back. glibc returns such memory to the kernel at
once and asks for it again, and every page of it is then zeroed and mapped anew: about a tenth of a step. Here it is
kept (up to what was in use at once), and lies in large pages where the kernel offers them.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
_KEPT = 2**40  # bytes: never given back

_TUNABLES = {
    "glibc.malloc.hugetlb": 1,  # madvise(MADV_HUGEPAGE)
    "glibc.malloc.mmap_threshold": _KEPT,
    "glibc.malloc.trim_threshold": _KEPT,
    "glibc.malloc.top_pad": 2**26,
}


def environment(device: str, given: Mapping[str, str]) -> dict[str, str]:
    """The variable to add; nothing for a GPU, or where it is given already."""
    if device != "cpu" or VARIABLE in given:
        return {}
    return {VARIABLE: ":".join(f"{name}={value}" for name, value in _TUNABLES.items())}
