"""What is kept, and when to stop: eval losses, steps and seconds so far → a verdict. Pure; called by the loop."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_SECONDS = 600
DEAREST_SHARE = 0.03


@dataclass(frozen=True)
class Best:
    """The lowest eval loss so far, and how many evaluations have not bettered it since."""

    step: int
    loss: float
    worse_since: int = 0


def after_eval(best: Best | None, step: int, loss: float) -> Best:
    """An equal loss isn't better: of equals the earlier weights are kept."""
    if best is None or loss < best.loss:
        return Best(step, loss)
    return Best(best.step, best.loss, best.worse_since + 1)


def should_stop(best: Best | None, patience: int | None) -> bool:
    """Whether as many evaluations in a row as `patience` brought nothing better."""
    return patience is not None and best is not None and best.worse_since >= patience


def is_eval_step(step: int, total: int, every: int) -> bool:
    """At every `every`-th step and at the end; 0 means only at the end."""
    return step == total or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class Cadence:
    """When checkpoints are taken: every `every` steps; `timed`: not where that costs too much, and never too late."""

    every: int
    timed: bool

    def __str__(self) -> str:
        return f"every {self.every} steps" + (f", or after {LONGEST_SECONDS // 60} minutes" if self.timed else "")


def cadence(every: int | str, total: int, *, exact: bool) -> tuple[Cadence, str]:
    """(when, reason). `every` is checkpoint.every; `exact`: which steps have one may not depend on a clock."""
    if isinstance(every, int):
        return Cadence(every, False), "checkpoint.every says so"
    tenth = -(-total // 10)
    if exact:
        return Cadence(tenth, False), "a tenth of the run; a rollback goes back to one of these steps"
    return Cadence(tenth, True), f"a tenth of the run, as long as at most {DEAREST_SHARE:.0%} of its time goes there"


def is_checkpoint_step(when: Cadence, step: int, total: int, *, since: float, stalled: float, elapsed: float) -> bool:
    """Seconds: `since` the last checkpoint, `stalled` by all of them, `elapsed` in this attempt.

    At the end always, so that a pod that dies while it saves the result loses nothing.
    """
    if step == total or (when.timed and since >= LONGEST_SECONDS):
        return True
    return step % when.every == 0 and (not when.timed or stalled <= DEAREST_SHARE * elapsed)
