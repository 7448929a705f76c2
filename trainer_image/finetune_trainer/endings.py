"""The last words of a pod: what happened → Result. Called by the supervisor, one function an ending."""

from __future__ import annotations

import errno
import traceback

from finetune_api.evaluation import Evaluation
from finetune_api.manifest import Manifest
from finetune_api.result import Result
from finetune_api.status import ArtifactStatus, CheckpointStatus, EvaluationStatus, ModelStatus
from finetune_trainer.failure import Failed
from finetune_trainer.log import Log
from finetune_trainer.state import TrainingState


def succeeded(state: TrainingState, artifact: ArtifactStatus, model: ModelStatus | None) -> Result:
    return Result(
        outcome="succeeded",
        step=state.step,
        total_steps=state.total_steps,
        artifact=artifact,
        evaluation=state.evaluation,
        model=model,
        data=state.data,
    )


def finished_before(manifest: Manifest, artifact: ArtifactStatus, scored: Evaluation | None) -> Result:
    """An earlier attempt finished, and its last word was lost: what it wrote tells it again."""
    figures = manifest.metrics
    evaluation = EvaluationStatus(
        train_loss=figures.get("trainLoss"),
        eval_loss=figures.get("evalLoss"),
        eval_reward_margin=figures.get("evalRewardMargin"),
        eval_reward_accuracy=figures.get("evalRewardAccuracy"),
        test_loss_before=figures.get("testLossBefore"),
        test_loss_after=figures.get("testLossAfter"),
        test_reward_margin=figures.get("testRewardMargin"),
        test_reward_accuracy=figures.get("testRewardAccuracy"),
        scored_rows=scored.answered or None if scored else None,
        scores=tuple(score.short for score in scored.scores) if scored else (),
    )
    return Result(outcome="succeeded", step=manifest.step, artifact=artifact, evaluation=evaluation)


def preempted(state: TrainingState, checkpoint: CheckpointStatus | None, model: ModelStatus | None) -> Result:
    step = checkpoint.step if checkpoint else 0
    return Result(
        outcome="preempted",
        reason="Preempted",
        message=f"asked to leave at step {state.step}; it goes on from step {step}",
        step=state.step,
        total_steps=state.total_steps,
        checkpoint=checkpoint,
        model=model,
    )


def failed(why: Failed, state: TrainingState, checkpoint: CheckpointStatus | None, model: ModelStatus | None) -> Result:
    return Result(
        outcome="failed",
        reason=why.reason,
        message=why.message,
        rank=why.rank,
        exit_code=why.exit_code,
        log_tail=why.log_tail,
        step=state.step,
        total_steps=state.total_steps,
        checkpoint=checkpoint,
        model=model,
    )


def own_failure(error: Exception, log: Log) -> Failed:
    """The supervisor's own error, which nobody foresaw."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed("DiskFull", f"resources.scratch: {error.filename}: {error.strerror}; raise it")
    log.error("the supervisor itself failed", traceback=traceback.format_exc())
    return Failed("TrainingError", f"{type(error).__name__}: {error}", log_tail=traceback.format_exc())
