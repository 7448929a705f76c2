"""Stores checkpoints on a node's disk: defines what they consist of, and saves them so that only
complete ones exist.

A folder `step-N` is first written as step-N.tmp, with its manifest last, synced to disk and then
renamed. It contains weights.safetensors, optimizer.safetensors, best.safetensors (if earlier
weights were better) and state.json; nothing is pickled. If checkpoints are sharded (see `sharded`),
a node's folder contains the files that its ranks wrote, and its manifest lists only those.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from finetune_api.messages.manifest import FileEntry
from finetune_api.messages.run import JobRef
from finetune_api.names import CHECKPOINT_STATE
from finetune_trainer import manifest
from finetune_trainer.checkpoint import sharded
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.errors import RunError
from finetune_trainer.paths import step_number

WEIGHTS, OPTIMIZER, BEST = "weights.safetensors", "optimizer.safetensors", "best.safetensors"
STATE = CHECKPOINT_STATE
KEPT_LOCALLY = 2


def begin(root: Path, step: int) -> Path:
    """Makes an empty folder for a partial checkpoint and returns it. Only one rank of a node does
    so."""
    partial = partial_folder(root, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def by_step(root: Path) -> dict[int, Path]:
    """Returns the folders of the complete checkpoints in `root`, by step."""
    return {step: path for path in root.glob("step-*") if (step := step_number(path.name)) is not None}


def partial_folder(root: Path, step: int) -> Path:
    """Returns the folder to which the checkpoint of a step is written until it is complete."""
    return root / f"step-{step}.tmp"


def save(
    partial: Path,
    state: CheckpointState,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    job: JobRef,
    keep: int = KEPT_LOCALLY,
) -> Path:
    """Writes gathered tensors to a partial folder and completes it. Only rank 0 does so.

    Returns the complete folder. Only the last `keep` checkpoints stay.
    """
    _save_tensors(weights, partial / WEIGHTS)
    if state.updates:
        _save_tensors(moments, partial / OPTIMIZER)
    return complete(partial, state, job, keep)


@dataclass
class Part:
    """Describes what one rank writes to a sharded checkpoint.

    `own` has the rank's parts of tensors by kind, which are freed as they are written. `best` is a
    file of the best weights that is already in the folder, if any. The first of `node_ranks`, the
    ranks of its node, completes the folder.
    """

    rank: int
    node_ranks: range
    index: sharded.Index
    own: dict[str, dict[str, Tensor]]
    best: Path | None


def save_part(
    partial: Path, state: CheckpointState, part: Part, *, job: JobRef, keep: int = KEPT_LOCALLY
) -> Path | None:
    """Writes this rank's part to a partial folder. Every rank does so.

    The first rank of a node waits for the others, completes the folder and returns it. The other
    ranks return None.
    """
    written = [sharded.write(partial, kind, part.rank, part.own.pop(kind)) for kind in tuple(part.own)]
    sharded.announce(partial, part.rank, (*written, *([part.best] if part.best else [])))
    if part.rank != part.node_ranks[0]:
        return None
    entries = sharded.collect(partial, part.node_ranks)
    (partial / manifest.INDEX).write_text(part.index.model_dump_json(by_alias=True))
    return complete(partial, state, job, keep, entries)


def complete(partial: Path, state: CheckpointState, job: JobRef, keep: int, known: tuple[FileEntry, ...] = ()) -> Path:
    """Completes a partial folder to which all tensors have been written, and returns its final
    path.

    One rank of each node does so. Files in `known` aren't read again for their digests.
    """
    root = partial.parent
    folder = root / f"step-{state.step}"
    (partial / STATE).write_text(state.model_dump_json(by_alias=True))
    manifest.write_checkpoint_manifest(partial, job, state.step, known)
    for path in partial.iterdir():
        _sync(path)
    _sync(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    _sync(root)
    _prune(root, keep)
    return folder


def read_state(folder: Path, *, verify: bool = True) -> CheckpointState | None:
    """Returns the state to resume from, or None if there is no folder, which means a fresh start.

    Raises RunError if the folder isn't a complete checkpoint.
    """
    if not folder.is_dir():
        return None
    problem = manifest.verify(folder) if verify else None
    if problem is not None:
        raise RunError("TrainingError", f"the checkpoint to resume from isn't complete: {problem}")
    try:
        return CheckpointState.model_validate_json((folder / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError("TrainingError", f"the checkpoint's {STATE} can't be read: {error}") from None


def replace(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaces a file atomically, since checkpoints may still have a hard link to the old one."""
    partial = path.with_suffix(".tmp")
    save_file(dict(tensors), partial)
    os.replace(partial, path)


def size(folder: Path) -> int:
    """Returns the total number of bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise RuntimeError(f"{path.name}: refusing to write empty tensors ({', '.join(empty[:3]) or 'none at all'})")
    save_file(dict(tensors), path)


def _prune(root: Path, keep: int) -> None:
    folders = by_step(root)
    for step in sorted(folders)[:-keep]:
        shutil.rmtree(folders[step], ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
