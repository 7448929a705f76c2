"""Which weights are the best so far, and when to stop early, decided from eval losses. Pure."""

from __future__ import annotations

from finetune_trainer.checkpoint.state import Best


def after_eval(best: Best | None, step: int, loss: float) -> Best:
    """The best weights after an evaluation. Of equal losses, the earlier one stays the best."""
    if best is None or loss < best.loss:
        return Best(step, loss)
    return Best(best.step, best.loss, best.worse_since + 1)


def should_stop(best: Best | None, patience: int | None) -> bool:
    """Whether the last `patience` evaluations in a row brought no lower loss."""
    return patience is not None and best is not None and best.worse_since >= patience


def is_eval_step(step: int, total: int, every: int) -> bool:
    """Whether to evaluate after this step: every `every` steps and at the end. 0 means only at the
    end."""
    return step == total or (every > 0 and step % every == 0)
