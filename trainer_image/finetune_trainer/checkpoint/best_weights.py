"""Keeps the weights with the lowest eval loss so far on disk while training continues
(training.keepBest).

Like checkpoints, they are either gathered by rank 0 in one file, or written by every rank as its
own part, next to an index. A checkpoint contains a hard link to them. All ranks must call all
methods at the same time.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer import manifest
from finetune_trainer.checkpoint import local_folder, reader, sharded
from finetune_trainer.checkpoint.sharded import Sharding
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.parallel.strategy import ParallelStrategy
from finetune_trainer.parallel.world import World

KIND = "best"


@dataclass(frozen=True)
class BestWeights:
    """Stores the best weights in `folder` on each node's disk, or only on rank 0's if they aren't
    sharded."""

    folder: Path
    strategy: ParallelStrategy
    world: World
    sharding: Sharding | None

    def keep(self) -> None:
        """Saves the current weights as the best ones."""
        if self.sharding is not None:
            self._make_folder()
            local_folder.replace(self._file, self.sharding.strategy.own_weights())
            return
        weights = self.strategy.weights()
        if self.world.is_first:
            self.folder.mkdir(exist_ok=True)
            local_folder.replace(self._file, weights)

    def restore(self) -> None:
        """Replaces the model's weights with the best ones.

        Raises RuntimeError if no rank has them.
        """
        tensors = reader.open_everywhere(self.folder, KIND, self.world)
        if tensors is None:
            raise RuntimeError(f"no rank has the best weights in {self.folder}")
        self.strategy.set_weights(tensors)

    def recover(self, resumed: Path, saved: CheckpointState | None) -> None:
        """Saves the best weights from an earlier attempt's checkpoint, divided as this run divides
        them.

        Every node must have that checkpoint. Raises RuntimeError if it has no weights.
        """
        if self.world.is_first_of_node:
            shutil.rmtree(self.folder, ignore_errors=True)
        if saved is None or saved.best is None:
            return
        tensors = reader.open_kind(resumed, KIND) or reader.open_kind(resumed, "weights")
        if tensors is None:
            raise RuntimeError(f"the checkpoint in {resumed} has no weights")
        if self.sharding is not None:
            self._make_folder()
            extents = self.sharding.strategy.extents()
            own = {name: tensors.part(name, extent.offset, extent.length) for name, extent in extents.items()}
            local_folder.replace(self._file, own)
        elif self.world.is_first:
            self.folder.mkdir(exist_ok=True)
            local_folder.replace(self._file, tensors)

    def link(self, partial: Path) -> Path | None:
        """Links this rank's file, which may soon be replaced, into a partial checkpoint.

        Returns the link, or None if this rank has no file.
        """
        if self.sharding is None and not self.world.is_first:
            return None
        linked = partial / self._file.name
        os.link(self._file, linked)
        return linked

    @property
    def _file(self) -> Path:
        name = f"{KIND}.safetensors" if self.sharding is None else sharded.file(KIND, self.world.rank)
        return self.folder / name

    def _make_folder(self) -> None:
        if self.sharding is not None and self.world.is_first_of_node and not self.folder.exists():
            self.folder.mkdir()
            (self.folder / manifest.INDEX).write_text(self.sharding.index.model_dump_json(by_alias=True))
        self.world.barrier()
