"""Builds the Result that a pod leaves as its termination message, with one function per outcome."""

from __future__ import annotations

import traceback

from finetune_api.messages.evaluation import Evaluation
from finetune_api.messages.manifest import Manifest
from finetune_api.messages.result import Result
from finetune_api.status import ArtifactStatus, CheckpointStatus, EvaluationStatus, ModelStatus
from finetune_trainer.errors import RunError, is_disk_full
from finetune_trainer.log import Log
from finetune_trainer.reporting.run_state import RunState


def succeeded(state: RunState, artifact: ArtifactStatus | None, model: ModelStatus | None) -> Result:
    """Returns the result of an attempt that trained and uploaded."""
    return Result(
        outcome="succeeded",
        step=state.step,
        total_steps=state.total_steps,
        artifact=artifact,
        evaluation=state.evaluation,
        model=model,
        data=state.data,
    )


def already_finished(manifest: Manifest, artifact: ArtifactStatus, scored: Evaluation | None) -> Result:
    """Returns the result of an earlier attempt, read from what it uploaded.

    That attempt finished, but its termination message was lost.
    """
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
        scores=tuple(score.status for score in scored.scores) if scored else (),
    )
    return Result(outcome="succeeded", step=manifest.step, artifact=artifact, evaluation=evaluation)


def preempted(state: RunState, checkpoint: CheckpointStatus | None, model: ModelStatus | None) -> Result:
    """Returns the result of an attempt that was asked to stop, and can resume from `checkpoint`."""
    position = f" at step {state.step}" if state.step else ""
    resumes = f"; the next attempt resumes from step {checkpoint.step}" if checkpoint else ""
    return Result(
        outcome="preempted",
        reason="Preempted",
        message=f"asked to stop{position}{resumes}",
        step=state.step,
        total_steps=state.total_steps,
        checkpoint=checkpoint,
        model=model,
    )


def failed(error: RunError, state: RunState, checkpoint: CheckpointStatus | None, model: ModelStatus | None) -> Result:
    """Returns the result of an attempt that failed."""
    return Result(
        outcome="failed",
        reason=error.reason,
        message=error.message,
        rank=error.rank,
        exit_code=error.exit_code,
        log_tail=error.log_tail,
        step=state.step,
        total_steps=state.total_steps,
        checkpoint=checkpoint,
        model=model,
    )


def unexpected(error: Exception, log: Log) -> RunError:
    """Returns the RunError for an exception in the supervisor itself, which is logged."""
    if isinstance(error, OSError) and is_disk_full(error):
        return RunError("DiskFull", f"resources.scratch: {error.filename}: {error.strerror}; raise it")
    log.error("the supervisor itself failed", traceback=traceback.format_exc())
    return RunError("TrainingError", f"{type(error).__name__}: {error}", log_tail=traceback.format_exc())
