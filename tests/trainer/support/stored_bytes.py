"""Records how many bytes of packed 4-bit weights a rank holds while its model is being sharded.

A rank's process is prepared before its run starts (see `rank_runs.RunningRanks`): PyTorch's
`fully_shard` is observed, which is called once for each layer and then for the model.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.paths import Paths


@dataclass(frozen=True)
class Held:
    """The bytes of packed weights that a rank holds when the last layer has been sharded, and the
    most that it held before the sharding of a layer."""

    sharded: int
    peak: int


@dataclass(frozen=True)
class StoredBytes:
    """Observes a rank's process."""

    def install(self) -> None:
        from torch.distributed import fsdp

        original, peak = fsdp.fully_shard, 0

        def observed(module: Any, **options: Any) -> Any:
            nonlocal peak
            peak = max(peak, _packed_bytes())
            sharded = original(module, **options)
            path = Path(os.environ["FINETUNE_SCRATCH"], f"stored-{os.environ['RANK']}.json")
            path.write_text(json.dumps(asdict(Held(_packed_bytes(), peak))))
            return sharded

        fsdp.fully_shard = observed  # type: ignore[assignment]


def read(paths: Paths, rank: int) -> Held:
    """Returns what a rank held."""
    return Held(**json.loads((paths.scratch / f"stored-{rank}.json").read_text()))


def _packed_bytes() -> int:
    import bitsandbytes

    layers = [item for item in gc.get_objects() if isinstance(item, bitsandbytes.nn.Linear4bit)]
    parts = [getattr(layer.weight, "_local_tensor", layer.weight) for layer in layers]
    return sum(part.numel() * part.element_size() for part in parts if not part.is_meta)
