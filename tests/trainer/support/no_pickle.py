"""Makes everything that could unpickle a message fail in a rank's process.

A rank's process is prepared before its run starts (see `rank_runs.RunningRanks`).
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.distributed import distributed_c10d


class Unpickled(BaseException):
    """Reports that something was unpickled; no `except Exception` of a library hides it."""


@dataclass(frozen=True)
class NoPickle:
    """Replaces pickle's readers, also where PyTorch has its own names for them."""

    def install(self) -> None:
        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise Unpickled("a rank unpickled something")

        for name in ("load", "loads", "_load", "_loads", "Unpickler", "_Unpickler"):
            setattr(pickle, name, refuse)
        distributed_c10d._unpickler = refuse  # type: ignore[assignment]
