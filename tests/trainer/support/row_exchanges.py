"""Records which ranks a rank exchanges parts of a row with.

A rank's process is prepared before its run starts (see `rank_runs.RunningRanks`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.paths import Paths


@dataclass(frozen=True)
class RowExchanges:
    """Observes a rank's process."""

    def install(self) -> None:
        import torch.distributed as dist

        exchange, path = dist.all_to_all_single, Path(os.environ["FINETUNE_SCRATCH"])
        path /= f"exchanges-{os.environ['RANK']}.json"
        counts: dict[str, int] = {}

        def observed(*arguments: Any, **options: Any) -> Any:
            ranks = json.dumps(dist.get_process_group_ranks(options["group"]))
            counts[ranks] = counts.get(ranks, 0) + 1
            path.write_text(json.dumps(counts))
            return exchange(*arguments, **options)

        dist.all_to_all_single = observed


def read(paths: Paths, rank: int) -> dict[tuple[int, ...], int]:
    """Returns how often a rank exchanged parts of rows, by the ranks that took part."""
    counts = json.loads((paths.scratch / f"exchanges-{rank}.json").read_text())
    return {tuple(json.loads(ranks)): count for ranks, count in counts.items()}
