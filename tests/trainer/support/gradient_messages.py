"""Counts the messages in which a rank of fsdp reduces gradients.

A rank's process is prepared before its run starts (see `rank_runs.RunningRanks`): the two
collectives that FSDP2 reduces gradients with are observed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.paths import Paths


@dataclass
class Messages:
    """How often gradients were scattered among the ranks of a copy of the model, and summed over
    the copies."""

    within_copies: int = 0
    between_copies: int = 0


@dataclass(frozen=True)
class GradientMessages:
    """Observes a rank's process."""

    def install(self) -> None:
        import torch.distributed as dist

        scatter, reduce, messages = dist.reduce_scatter_single, dist.all_reduce, Messages()
        path = Path(os.environ["FINETUNE_SCRATCH"], "messages.json")

        def observed_scatter(*arguments: Any, **options: Any) -> Any:
            messages.within_copies += 1
            path.write_text(json.dumps(asdict(messages)))
            return scatter(*arguments, **options)

        def observed_reduce(*arguments: Any, **options: Any) -> Any:
            messages.between_copies += options.get("group") is not None  # the run's own sums are over all ranks
            path.write_text(json.dumps(asdict(messages)))
            return reduce(*arguments, **options)

        dist.reduce_scatter_single = observed_scatter
        dist.all_reduce = observed_reduce


def read(paths: Paths) -> Messages:
    """Returns what the observed rank sent."""
    return Messages(**json.loads((paths.scratch / "messages.json").read_text()))
