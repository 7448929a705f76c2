"""Decides when checkpoints are saved, from the steps and seconds so far. This module is pure."""

from __future__ import annotations

from dataclasses import dataclass

MAX_INTERVAL_SECONDS = 600
MAX_TIME_SHARE = 0.03


@dataclass(frozen=True)
class Cadence:
    """Describes the schedule of checkpoints: one every `every` steps.

    If `timed`, one is skipped while checkpointing has cost more than MAX_TIME_SHARE of the time,
    and one is forced after MAX_INTERVAL_SECONDS without any.
    """

    every: int
    timed: bool

    def __str__(self) -> str:
        return f"every {self.every} steps" + (f", or after {MAX_INTERVAL_SECONDS // 60} minutes" if self.timed else "")


def cadence(every: int | str, total: int, *, exact: bool) -> tuple[Cadence, str]:
    """Returns (the schedule, the reason).

    `every` is checkpoint.every, and `total` is the number of steps. With `exact`, the steps that
    have a checkpoint must not depend on a clock.
    """
    if isinstance(every, int):
        return Cadence(every, False), "set by checkpoint.every"
    tenth = -(-total // 10)
    if exact:
        return Cadence(tenth, False), "a tenth of the run; a rollback goes back to one of these steps"
    return Cadence(tenth, True), f"a tenth of the run, unless saving takes more than {MAX_TIME_SHARE:.0%} of its time"


def is_checkpoint_step(
    schedule: Cadence, step: int, total: int, *, since: float, stalled: float, elapsed: float
) -> bool:
    """Returns whether a checkpoint is saved after this step.

    In seconds, `since` is the time since the last checkpoint, `stalled` is what all checkpoints
    have cost so far, and `elapsed` is the duration of this attempt so far. The last step always has
    a checkpoint, so that nothing is lost if a pod dies while it saves the result.
    """
    if step == total or (schedule.timed and since >= MAX_INTERVAL_SECONDS):
        return True
    return step % schedule.every == 0 and (not schedule.timed or stalled <= MAX_TIME_SHARE * elapsed)
