"""Which weights are kept, and when to stop: the eval losses so far → a verdict. Pure; called after each evaluation."""

from __future__ import annotations

from dataclasses import dataclass


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


def is_checkpoint_step(step: int, total: int, every: int) -> bool:
    """At every `every`-th step, and at the end so that a pod that dies while it saves the result loses nothing."""
    return step == total or step % every == 0


def checkpoint_interval(every: int | str, total: int) -> int:
    """`auto` is a tenth of the run."""
    return every if isinstance(every, int) else -(-total // 10)
