"""Checkpoints on a node's disk: saving, reading, and what a resumed run needs to go on as if never stopped.

A folder `step-N` exists only complete: it is written as step-N.tmp, its manifest last, synced, then renamed.
`saving` does so in a thread of its own.
weights.safetensors, optimizer.safetensors, best.safetensors (where earlier weights were better) and state.json; no
pickle. Or the same in shards (see `shards`): then a node's folder holds what its ranks wrote, and its manifest lists
that alone. Called by the loop and by `rank`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from finetune_api.manifest import FileEntry
from finetune_api.model import LenientModel
from finetune_api.run import JobRef
from finetune_trainer import guards, manifest_io, shards
from finetune_trainer.failure import Failed
from finetune_trainer.guards import Skipped
from finetune_trainer.selection import Best

WEIGHTS, OPTIMIZER, BEST, STATE = "weights.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"
KEPT_LOCALLY = 2


class BestState(LenientModel):
    step: int
    loss: float
    worse_since: int


class State(LenientModel):
    """All that isn't a tensor. There is no random state: every draw is a function of seed, step and rank."""

    step: int = 0
    data_key: str = Field(default="", description="The rows that the plan was made of.")
    dtype: str = ""
    micro_tokens: int = Field(default=0, description="Tokens that a rank computed at once, before any halving.")
    halvings: int = Field(default=0, description="How often micro-batches were halved for want of memory.")
    strategy: Literal["", "ddp", "zero1", "zero2", "zero3", "fsdp"] = ""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    skipped: tuple[Skipped, ...] = Field(default=(), description="Steps that changed nothing, in their order.")
    losses: tuple[float, ...] = Field(default=(), description="The last ones, for telling a spike.")
    compiled: bool | None = None
    best: BestState | None = None
    eval_due: bool = Field(default=False, description="The evaluation after this step is still to be done.")
    stopped_early: bool = False
    test_loss_before: float | None = None
    test_parts_before: tuple[tuple[float, float], ...] = Field(
        default=(), description="Loss and learnt tokens of each test row, or of rows together where there are many."
    )
    answers_before: tuple[str, ...] = ()
    unfinished_before: int = 0

    @property
    def updates(self) -> int:
        """How often the optimizer stepped."""
        return self.step - guards.steps(self.skipped)

    def written(self, *, keep_best: bool) -> int:
        """The step whose weights are the result."""
        return self.best.step if keep_best and self.best else self.step

    @property
    def chosen(self) -> Best | None:
        return Best(self.best.step, self.best.loss, self.best.worse_since) if self.best else None

    def with_best(self, best: Best) -> State:
        return self.model_copy(update={"best": BestState(**asdict(best))})


def begin(root: Path, step: int) -> Path:
    """One rank of a node. A new folder for what is to be saved."""
    aside = aside_of(root, step)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def aside_of(root: Path, step: int) -> Path:
    return root / f"step-{step}.tmp"


def save(
    aside: Path,
    state: State,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    job: JobRef,
    keep: int = KEPT_LOCALLY,
) -> Path:
    """Rank 0 only; fills what `begin` gave. Returns the complete folder; of older ones the last `keep` stay."""
    _save_tensors(weights, aside / WEIGHTS)
    if state.updates:
        _save_tensors(moments, aside / OPTIMIZER)
    return complete(aside, state, job, keep)


@dataclass
class Part:
    """What one rank writes. `own`: its parts of tensors by kind, let go as they are written; `best`: a file that is
    there already. The first of `ranks_here`, those of its node, completes the folder."""

    rank: int
    ranks_here: range
    index: shards.Index
    own: dict[str, dict[str, Tensor]]
    best: Path | None


def save_part(aside: Path, state: State, part: Part, *, job: JobRef, keep: int = KEPT_LOCALLY) -> Path | None:
    """Every rank. The complete folder where this rank completes it, once all ranks of its node have written theirs."""
    written = [shards.write(aside, kind, part.rank, part.own.pop(kind)) for kind in tuple(part.own)]
    shards.tell(aside, part.rank, (*written, *([part.best] if part.best else [])))
    if part.rank != part.ranks_here[0]:
        return None
    entries = shards.hear(aside, part.ranks_here)
    (aside / manifest_io.INDEX).write_text(part.index.model_dump_json(by_alias=True))
    return complete(aside, state, job, keep, entries)


def complete(aside: Path, state: State, job: JobRef, keep: int, known: tuple[FileEntry, ...] = ()) -> Path:
    """One rank of a node. All tensors are there; of the files in `known` the digests are known."""
    root = aside.parent
    folder = root / f"step-{state.step}"
    (aside / STATE).write_text(state.model_dump_json(by_alias=True))
    manifest_io.write_manifest(aside, kind="checkpoint", job=job, step=state.step, known=known)
    for path in aside.iterdir():
        _sync(path)
    _sync(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    _sync(root)
    _prune(root, keep)
    return folder


def read_state(folder: Path, *, verify: bool = True) -> State | None:
    """The state to go on from, or None on a fresh start. Raises Failed for a folder that isn't a whole checkpoint."""
    if not folder.is_dir():
        return None
    why = manifest_io.verify(folder) if verify else None
    if why is not None:
        raise Failed("TrainingError", f"the checkpoint to resume from isn't complete: {why}")
    try:
        return State.model_validate_json((folder / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise Failed("TrainingError", f"the checkpoint's {STATE} can't be read: {error}") from None


def replace(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The file as a whole (checkpoints may still hold a link to the old one)."""
    aside = path.with_suffix(".tmp")
    save_file(dict(tensors), aside)
    os.replace(aside, path)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise RuntimeError(f"{path.name}: refusing to write empty tensors ({', '.join(empty[:3]) or 'none at all'})")
    save_file(dict(tensors), path)


def _prune(root: Path, keep: int) -> None:
    steps = sorted((p for p in root.glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
    for old in steps[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
