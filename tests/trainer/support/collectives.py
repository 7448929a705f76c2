"""Counts the all-gathers of tensors that a rank takes part in while it generates text.

A rank's process is prepared before its run starts (see `rank_runs.RunningRanks`).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import GenerationMixin

from finetune_trainer.paths import Paths

_ALL_GATHERS = ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_coalesced")


@dataclass
class Counts:
    """The all-gathers inside of `generate`, and the tokens that it returned."""

    all_gathers: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class CountedAllGathers:
    """Observes PyTorch's collectives and Transformers' `generate` in a rank's process."""

    def install(self) -> None:
        counts, generating = Counts(), False

        def counted(original: Any) -> Any:
            def all_gather(*arguments: Any, **options: Any) -> Any:
                counts.all_gathers += generating
                return original(*arguments, **options)

            return all_gather

        for name in _ALL_GATHERS:
            for module in (dist, dist.distributed_c10d):
                if hasattr(module, name):
                    setattr(module, name, counted(getattr(module, name)))
        generate = GenerationMixin.generate

        def observed(model: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal generating
            generating = True
            sequences = generate(model, *arguments, **options)
            generating = False
            counts.tokens += sequences.shape[1] - options["input_ids"].shape[1]
            path = Path(os.environ["FINETUNE_SCRATCH"], f"collectives-{os.environ['RANK']}.json")
            path.write_text(json.dumps(asdict(counts)))
            return sequences

        GenerationMixin.generate = observed


def read(paths: Paths, rank: int) -> Counts:
    """Returns what a rank counted. A rank that generated nothing counted nothing."""
    path = paths.scratch / f"collectives-{rank}.json"
    return Counts(**json.loads(path.read_text())) if path.is_file() else Counts()
