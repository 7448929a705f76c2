"""Rollback after a loss spike: back to the checkpoint before it, without the steps since.

The steps that are rolled back count as done and are passed over, as PaLM's authors did by hand
(Chowdhery et al. 2022, section 5.1): the same rows cause no trouble with other weights.
"""

from __future__ import annotations

from pathlib import Path

from finetune_api.messages import events
from finetune_trainer.checkpoint import local_folder, reader
from finetune_trainer.checkpoint.async_saver import Saver
from finetune_trainer.checkpoint.state import CheckpointState, Skipped
from finetune_trainer.errors import RunError
from finetune_trainer.training import anomalies
from finetune_trainer.training.context import Training


def roll_back_after_spike(
    t: Training, saver: Saver, state: CheckpointState, loss: float
) -> tuple[CheckpointState, bool]:
    """The state after this step's loss, and whether steps were rolled back.

    Raises RunError LossSpike if training.lossSpike asks for that.
    """
    state = state.model_copy(update={"losses": anomalies.recent(state.losses, loss)})
    spike = anomalies.spike(state.losses)
    if spike is None:
        return state, False
    policy = t.run.training.loss_spike
    t.reporter.report(events.SpikeEvent, step=state.step, loss=loss, limit=spike.limit, action=policy.action)
    rollbacks = sum(skip.reason == "LossSpike" for skip in state.skipped)
    if policy.action == "fail" or (policy.action == "rollback" and rollbacks >= policy.max_rollbacks):
        after = f" after {rollbacks} rollbacks (training.lossSpike.maxRollbacks)" if rollbacks else ""
        raise RunError(
            "LossSpike",
            f"step {state.step}: the loss is {loss:.4f}, and has been above {spike.limit:.4f} for {spike.steps} "
            f"steps, far from the ones before{after}; lower training.learningRate or training.maxGradNorm",
        )
    if policy.action == "rollback":
        saver.wait()
        restored = _restore(t, state.step - spike.steps)
        if restored is not None:
            return _rolled_back(t, state, restored), True
        t.reporter.decision("lossSpike", "no rollback", "there is no checkpoint from before the spike")
    return state.model_copy(update={"losses": ()}), False


def _rolled_back(t: Training, state: CheckpointState, restored: CheckpointState) -> CheckpointState:
    """The state at the current step with the losses of the restored one, and the skipped steps in
    between."""
    first = restored.step + 1
    t.reporter.report(events.SkippedEvent, step=state.step, first=first, reason="LossSpike")
    skipped = Skipped(first=first, last=state.step, reason="LossSpike")
    return state.model_copy(update={"skipped": (*restored.skipped, skipped), "losses": restored.losses})


def _restore(t: Training, latest: int) -> CheckpointState | None:
    """Restore weights and optimizer state as after step `latest` or earlier.

    Returns None if rank 0 has no such checkpoint on its disk.
    """
    newest = _newest(t, latest) if t.world.is_first else None
    name: str | None = t.world.broadcast(newest.name if newest else None, str | None)
    state: CheckpointState | None = t.world.broadcast(
        local_folder.read_state(newest) if newest else None, CheckpointState | None
    )
    if name is None or state is None:
        return None
    folder = t.paths.resume if name == t.paths.resume.name else t.paths.checkpoints / Path(name).name
    weights = reader.open_everywhere(folder, "weights", t.world)
    optimizer_state = reader.open_everywhere(folder, "optimizer", t.world)
    if weights is None or (optimizer_state is None and state.updates):
        raise RuntimeError(f"{folder} lacks tensors")
    t.strategy.set_weights(weights)
    if optimizer_state is not None and state.updates:
        t.strategy.set_optimizer_state(optimizer_state, state.updates)
    return state


def _newest(t: Training, latest: int) -> Path | None:
    """The folder of the newest local checkpoint up to step `latest`, also that which the run
    resumed from."""
    by_step = local_folder.by_step(t.paths.checkpoints)
    if t.paths.resume.is_dir() and (state := local_folder.read_state(t.paths.resume)) is not None:
        by_step.setdefault(state.step, t.paths.resume)
    steps = [step for step in by_step if step <= latest]
    return by_step[max(steps)] if steps else None
