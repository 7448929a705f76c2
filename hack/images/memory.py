"""A folder in memory for the temporary files of large builds, on machines that have enough of it.

What is written there costs no disk traffic. The folder of a process is removed when it ends; that
of a killed process is removed by the next one.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_MEMINFO = Path("/proc/meminfo")
_NAME = re.compile(r"finetune-operator-(\d+)")
_RESERVE = 4 << 30


def memory_folder(need: int, shared: Path = _SHARED_MEMORY, meminfo: Path = _MEMINFO) -> Path | None:
    """Returns this process's folder in memory for temporary files of `need` bytes in total.

    None if there is too little: half as much again, at least 4 GiB, must stay available for other
    programs.
    """
    try:
        _remove_abandoned(shared)
        free = shutil.disk_usage(shared).free
        if free < need or available_bytes(meminfo) < need + max(need // 2, _RESERVE):
            return None
        folder = shared / f"finetune-operator-{os.getpid()}"
        if not folder.exists():
            folder.mkdir(mode=0o700)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
    except OSError:
        return None
    return folder


def available_bytes(meminfo: Path = _MEMINFO) -> int:
    """Returns the bytes of MemAvailable in /proc/meminfo; 0 if it isn't there."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def _remove_abandoned(shared: Path) -> None:
    """Removes the folders of processes that no longer exist."""
    for folder in shared.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)
