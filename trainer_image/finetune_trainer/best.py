"""The weights with the lowest eval loss so far, kept on disk while training goes on (training.keepBest).

As checkpoints are: rank 0 gathers them in one file, or every rank writes its own part beside an index. A checkpoint
holds a link to them. Used by the loop, `saving` and `assembly`; all methods are called by all ranks at the same time.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer import checkpoint, manifest_io, shards, stored
from finetune_trainer.checkpoint import State
from finetune_trainer.learner import Learner
from finetune_trainer.shards import Sharding
from finetune_trainer.world import World

KIND = "best"


@dataclass(frozen=True)
class BestWeights:
    """`folder` is on each node's disk; without shards only rank 0's has it."""

    folder: Path
    learner: Learner
    world: World
    sharding: Sharding | None

    def keep(self) -> None:
        """The weights as they are now."""
        if self.sharding is not None:
            self._make_folder()
            checkpoint.replace(self._file, self.sharding.learner.own_weights())
            return
        weights = self.learner.weights()
        if self.world.is_first:
            self.folder.mkdir(exist_ok=True)
            checkpoint.replace(self._file, weights)

    def put_back(self) -> None:
        tensors = stored.within_reach(self.folder, KIND, self.world)
        if tensors is None:
            raise RuntimeError("the best weights were kept nowhere")
        self.learner.set_weights(tensors)

    def recover(self, resumed: Path, saved: State | None) -> None:
        """What an earlier attempt's checkpoint holds, cut as this run cuts; every node has that checkpoint."""
        if self.world.is_first_of_node:
            shutil.rmtree(self.folder, ignore_errors=True)
        if saved is None or saved.best is None:
            return
        tensors = stored.open_kind(resumed, KIND) or stored.open_kind(resumed, "weights")
        if tensors is None:
            raise RuntimeError(f"{resumed} holds no weights")
        if self.sharding is not None:
            self._make_folder()
            held = self.sharding.learner.extents()
            own = {name: tensors.part(name, extent.offset, extent.length) for name, extent in held.items()}
            checkpoint.replace(self._file, own)
        elif self.world.is_first:
            self.folder.mkdir(exist_ok=True)
            checkpoint.replace(self._file, tensors)

    def link(self, aside: Path) -> Path | None:
        """This rank's file into a checkpoint that is being made: it may be replaced soon. None where it has none."""
        if self.sharding is None and not self.world.is_first:
            return None
        linked = aside / self._file.name
        os.link(self._file, linked)
        return linked

    @property
    def _file(self) -> Path:
        whole = self.sharding is None
        return self.folder / (f"{KIND}.safetensors" if whole else shards.file(KIND, self.world.rank))

    def _make_folder(self) -> None:
        if self.sharding is not None and self.world.is_first_of_node and not self.folder.exists():
            self.folder.mkdir()
            (self.folder / manifest_io.INDEX).write_text(self.sharding.index.model_dump_json(by_alias=True))
        self.world.wait()
