"""The memory controller's count of processes killed for memory in this container. Read by the supervisor only."""

from __future__ import annotations

import re
from pathlib import Path

# The container's own cgroup: unified (v2), then the memory hierarchy (v1).
_FILES = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def oom_kills(files: tuple[Path, ...] = _FILES) -> int:
    """Kills since the container began; 0 where it can't be read."""
    for file in files:
        try:
            found = _COUNT.search(file.read_text())
        except OSError:
            continue
        if found:
            return int(found.group(1))
    return 0
