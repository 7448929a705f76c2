"""Gathers what `resolve` decides by: the hardware's number format, the model's size, the memory
that is free."""

from __future__ import annotations

import torch

from finetune_trainer import host_memory
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.data.dataset import Data
from finetune_trainer.data.splits import Split
from finetune_trainer.model import device_memory, flops, loading, precision
from finetune_trainer.parallel import model_size
from finetune_trainer.parallel.free_memory import FreeMemory
from finetune_trainer.parallel.world import World
from finetune_trainer.paths import Paths
from finetune_trainer.training.context import RankContext
from finetune_trainer.training.resolve import Facts, ResolvedRun


def gather(context: RankContext, data: Data, saved: CheckpointState | None) -> Facts:
    """All ranks call it together and get the same. Raises RunError for a model folder that can't be
    used."""
    run, world = context.run, context.world
    chooses = world.is_first and not (saved and saved.dtype)
    dtype = world.broadcast(precision.choose(run.model.dtype, world.device) if chooses else ("", ""), tuple[str, str])
    loading.check(context.paths.model)
    return Facts(
        dtype=dtype,
        longest=data.longest,
        size=model_size.read(context.paths.model, run.lora if run.method == "lora" else None, run.full),
        free_memory=_free_memory(world),
        halvings=world.broadcast(_earlier_halvings(context.paths), int),
        saved=saved,
    )


def flops_per_token(resolved: ResolvedRun, train: Split, computed_share: float) -> float | None:
    """The mean over the rows of `train`; None for layers that aren't built like those of Llama,
    such as a mixture of experts, which doesn't use all weights for every token.

    `computed_share` of the tokens are computed, less than 1 if prefixes are shared.
    """
    size = resolved.size
    if size.layer is None:
        return None
    lengths = train.lengths.astype("float64")
    tokens = float(lengths.sum())
    widths = flops.Widths(size.matrices, size.hidden, size.vocabulary, size.layers, size.layer.queries)
    total = flops.needed(
        widths,
        tokens=tokens * computed_share,
        labels=float(train.label_counts.sum()),
        pairs=float((lengths * (lengths + 1) / 2).sum()),
        full=resolved.run.method == "full",
    )
    return total / tokens if tokens else None


def peak_flops(resolved: ResolvedRun, device: torch.device) -> float | None:
    """The peak of this rank's GPU in bfloat16; None if it isn't known, or isn't the dtype."""
    if device.type != "cuda" or not resolved.half:
        return None
    return flops.peak(torch.cuda.get_device_name(device))


def _free_memory(world: World) -> FreeMemory:
    """The least that any rank has, so that all decide the same."""
    host = host_memory.free_bytes(world.local_size)
    device = device_memory.free_bytes(world.device, world.local_size)
    everywhere = world.all_gather((device, host), tuple[int, int])
    return FreeMemory(
        "cuda" if world.device.type == "cuda" else "cpu",
        min(device for device, _ in everywhere),
        min(host for _, host in everywhere),
    )


def _earlier_halvings(paths: Paths) -> int:
    return int(paths.halvings.read_text()) if paths.halvings.is_file() else 0
