"""After a loss spike: back to the checkpoint before it, without the steps since. Called by the loop after each step.

The steps that are undone count as done and are passed over, as PaLM's authors did by hand (Chowdhery et al. 2022,
section 5.1): the same rows in another state of the weights are no trouble.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import events
from finetune_trainer import checkpoint, guards, stored
from finetune_trainer.checkpoint import State
from finetune_trainer.failure import Failed
from finetune_trainer.saving import Saver

if TYPE_CHECKING:
    from finetune_trainer.train import Training


def after_spike(t: Training, saver: Saver, state: State, loss: float) -> tuple[State, bool]:
    """(the state with this step's loss, whether steps were undone). Raises Failed where the job wants it so."""
    state = state.model_copy(update={"losses": guards.remembered(state.losses, loss)})
    found = guards.spike(state.losses)
    if found is None:
        return state, False
    policy = t.run.training.loss_spike
    t.reporter.report(events.SpikeEvent, step=state.step, loss=loss, limit=found.limit, action=policy.action)
    told = (
        f"step {state.step}: the loss is {loss:.4f}, and has been above {found.limit:.4f} for {found.lasts} steps, far "
        "from the ones before"
    )
    done = sum(some.reason == "LossSpike" for some in state.skipped)
    if policy.action == "fail" or (policy.action == "rollback" and done >= policy.max_rollbacks):
        after = f" after {done} rollbacks (training.lossSpike.maxRollbacks)" if done else ""
        raise Failed("LossSpike", f"{told}{after}; lower training.learningRate or training.maxGradNorm")
    if policy.action == "rollback":
        saver.wait()
        back = _go_back(t, state.step - found.lasts)
        if back is not None:
            return _undone(t, state, back), True
        t.reporter.decision("lossSpike", "nothing is undone", "there is no checkpoint from before it")
    return state.model_copy(update={"losses": ()}), False


def _undone(t: Training, state: State, back: State) -> State:
    first = back.step + 1
    t.reporter.report(events.SkippedEvent, step=state.step, first=first, reason="LossSpike")
    spike = guards.Skipped(first=first, last=state.step, reason="LossSpike")
    return state.model_copy(update={"skipped": (*back.skipped, spike), "losses": back.losses})


def _go_back(t: Training, latest: int) -> State | None:
    """Weights and moments as after step `latest` at most; None where no such checkpoint is on rank 0's disk."""
    found = _newest(t, latest) if t.world.is_first else None
    name: str | None = t.world.firsts(found.name if found else None)
    state: State | None = t.world.firsts(checkpoint.read_state(found) if found else None)
    if name is None or state is None:
        return None
    folder = t.paths.resume if name == t.paths.resume.name else t.paths.checkpoints / name
    weights = stored.within_reach(folder, "weights", t.world)
    moments = stored.within_reach(folder, "optimizer", t.world)
    if weights is None or (moments is None and state.updates):
        raise RuntimeError(f"{folder} lacks tensors")
    t.learner.set_weights(weights)
    if moments is not None and state.updates:
        t.learner.set_moments(moments, state.updates)
    return state


def _newest(t: Training, latest: int) -> Path | None:
    found = [path for path in t.paths.checkpoints.glob("step-*") if path.name[5:].isdigit()]
    steps = {int(path.name[5:]): path for path in found}
    if t.paths.resume.is_dir() and (state := checkpoint.read_state(t.paths.resume)) is not None:
        steps.setdefault(state.step, t.paths.resume)
    good = [step for step in steps if step <= latest]
    return steps[max(good)] if good else None
