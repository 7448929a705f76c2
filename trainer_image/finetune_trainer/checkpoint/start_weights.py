"""Puts the weights of another job's checkpoint or adapter into the model before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from finetune_api.names import CHECKPOINT_MANIFEST
from finetune_trainer import manifest
from finetune_trainer.checkpoint import reader
from finetune_trainer.errors import RunError
from finetune_trainer.parallel.strategy import ParallelStrategy, TensorSource, trained
from finetune_trainer.parallel.world import World
from finetune_trainer.paths import Paths

_ADAPTER = "adapter_model.safetensors"


def put(strategy: ParallelStrategy, model: torch.nn.Module, paths: Paths, world: World) -> None:
    """Sets the weights to those in `paths.start`, if that exists. All ranks call it together.

    Raises RunError(CheckpointInvalid) if they don't fit the model, and RunError(StorageUnavailable)
    if the nodes have downloaded different ones.
    """
    digests = set(world.all_gather(digest(paths) if paths.start.is_dir() else None, str | None))
    if digests == {None}:
        return
    if len(digests) > 1:
        raise RunError("StorageUnavailable", "the nodes downloaded different checkpoints to start from")
    weights: TensorSource | None
    if (paths.start / _ADAPTER).is_file():
        weights = _AdapterReader(reader.FileReader(paths.start / _ADAPTER), _names_in_adapter(model))
    else:
        weights = reader.open_kind(paths.start, "weights")
    if weights is None:
        raise RunError("CheckpointInvalid", "model.checkpoint: it has no weights; name another checkpoint")
    different = sorted(weights.keys() ^ set(trained(model)))
    if different:
        raise RunError(
            "CheckpointInvalid",
            f"model.checkpoint: {len(different)} weights are missing here or there, e.g. {different[0]}; it belongs to "
            "another model or method",
        )
    strategy.set_weights(weights)


def digest(paths: Paths) -> str:
    """Returns the sha256 of the manifest of what the job starts from."""
    return manifest.of_file(paths.start / CHECKPOINT_MANIFEST)


class _AdapterReader(TensorSource):
    """Reads the weights of a PEFT adapter under the names that they have in the model."""

    def __init__(self, adapter: TensorSource, names: Mapping[str, str]) -> None:
        self._adapter = adapter
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        return self._adapter[self._names[name]]

    def part(self, name: str, offset: int, length: int) -> Tensor:
        return self._adapter.part(self._names[name], offset, length)

    def __iter__(self) -> Iterator[str]:
        return (name for name, written in self._names.items() if written in self._adapter)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _names_in_adapter(model: torch.nn.Module) -> dict[str, str]:
    """Returns the name that PEFT writes for each trained weight, by its name in the model."""
    from peft import get_peft_model_state_dict

    stand_ins = {name: torch.empty(0) for name in trained(model)}
    by_identity = {id(tensor): name for name, tensor in stand_ins.items()}
    written = get_peft_model_state_dict(model, state_dict=stand_ins, save_embedding_layers=False)
    return {by_identity[id(tensor)]: key for key, tensor in written.items() if id(tensor) in by_identity}
