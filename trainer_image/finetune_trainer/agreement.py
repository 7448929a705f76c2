"""What all ranks agree on after a step's micro-batches, before anything is changed. Called by the loop, once a step.

One small message a step; only where something went wrong a second one, for the details.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.plan import Step
from finetune_trainer.split import Split
from finetune_trainer.world import World


@dataclass(frozen=True)
class Micros:
    """A rank's micro-batches: their summed losses and figures, or why one of them had no memory."""

    nll: tuple[float, ...]
    short: str = ""
    figures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Agreed:
    """The same on all ranks. `short` is empty where memory sufficed, `bad_rows` where the loss is finite."""

    loss: float
    stop: bool
    due: bool
    short: str = ""
    bad_rows: tuple[int, ...] = ()
    figures: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        return not self.bad_rows


def agree(world: World, step: Step, rows: Split, own: Micros, *, stop: bool, due: bool) -> Agreed:
    """`stop` counts from any rank, `due` (a checkpoint) too: only rank 0 looks at its clock."""
    total = sum(own.nll)
    bad = not math.isfinite(total)
    told = [0.0] * len(own.figures) if bad else own.figures
    loss, any_bad, any_stop, any_due, any_short, *figures = world.total(
        0.0 if bad else total, float(bad), float(stop), float(due), float(bool(own.short)), *told
    )
    if any_short:
        return Agreed(0.0, any_stop > 0, any_due > 0, short=_first_short(world, own.short))
    lines = _bad_rows(world, step.micros[world.rank], rows, own.nll) if any_bad else ()
    return Agreed(loss / step.label_tokens, any_stop > 0, any_due > 0, bad_rows=lines, figures=tuple(figures))


def _first_short(world: World, own: str) -> str:
    said = world.everyones(own)
    return next(f"rank {rank}: {why}" for rank, why in enumerate(said) if why)


def _bad_rows(world: World, micros: Sequence[Sequence[int]], rows: Split, nll: Sequence[float]) -> tuple[int, ...]:
    """The lines of the rows that were in a micro-batch whose loss isn't finite, on any rank."""
    mine = [
        rows.line(example)
        for micro, value in zip(micros, nll, strict=True)
        if not math.isfinite(value)
        for example in micro
    ]
    return tuple(sorted({line for part in world.everyones(mine) for line in part}))
