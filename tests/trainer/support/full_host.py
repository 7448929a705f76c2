"""A host whose memory is taken by others as soon as a rank has sharded its model (see
`rank_runs.RunningRanks`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FullHost:
    """Makes /proc/meminfo report that nothing is available, in a rank's process."""

    def install(self) -> None:
        from torch.distributed import fsdp

        fully_shard, read_text, full = fsdp.fully_shard, Path.read_text, False

        def observed(module: Any, **options: Any) -> Any:
            nonlocal full
            full = True
            return fully_shard(module, **options)

        def read(path: Path, *arguments: Any, **options: Any) -> str:
            if full and str(path) == "/proc/meminfo":
                return "MemAvailable: 0 kB\n"
            return read_text(path, *arguments, **options)

        fsdp.fully_shard = observed  # type: ignore[assignment]
        Path.read_text = read  # type: ignore[method-assign]
