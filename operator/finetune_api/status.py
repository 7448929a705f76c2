"""Defines the status of a FineTuneJob, which follows the conventions of batch/v1 Job and kstatus.

Models are lenient, since an older operator may read what a newer one wrote.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.base import LenientModel

Phase = Literal["Pending", "Queued", "Starting", "Running", "Restarting", "Suspended", "Succeeded", "Failed"]
TERMINAL_PHASES = ("Succeeded", "Failed")

CONDITION_COMPLETE = "Complete"
CONDITION_FAILED = "Failed"
CONDITION_SUSPENDED = "Suspended"
CONDITION_RECONCILING = "Reconciling"
CONDITION_STALLED = "Stalled"


class Condition(LenientModel):
    """Describes a condition, by the Kubernetes API conventions."""

    type: str = Field(description="Complete, Failed, Suspended, Reconciling or Stalled.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    observed_generation: int = Field(default=0, description="The generation that this condition refers to.")
    last_transition_time: str = Field(description="When status last changed, RFC 3339 in UTC.")
    reason: str = Field(description="CamelCase name, for programs.")
    message: str = Field(default="", description="A sentence, for people.")


class Restarts(LenientModel):
    """Counts the restarts of the whole group so far, by cause."""

    application: int = Field(default=0, description="Failures of the training program itself.")
    infrastructure: int = Field(default=0, description="Failures of nodes, network and storage.")
    preemption: int = Field(default=0, description="Evictions and preemptions, which never count against a limit.")


class StragglerStatus(LenientModel):
    """Names a rank that stays slower than the others."""

    rank: int = Field(description="Number of the rank.")
    node: int = Field(description="Number of its pod, which is the last one in the pod's name.")
    ratio: float = Field(description="Its time per token divided by the median of the other ranks.")


class ProgressStatus(LenientModel):
    """Reports the progress of training; it is written at most every 30 s."""

    step: int = Field(default=0, description="Finished optimizer steps.")
    total_steps: int = Field(default=0, description="Total number of optimizer steps.")
    percent: int = Field(default=0, description="step / totalSteps, 0 to 100.")
    epoch: float = Field(default=0.0, description="Finished passes over the data.")
    train_loss: float | None = Field(
        default=None, description="Training loss of the last step: the mean over its supervised tokens."
    )
    eval_loss: float | None = Field(
        default=None, description="Validation loss: the mean over the supervised tokens of all rows."
    )
    reward_margin: float | None = Field(
        default=None,
        description="With objective dpo: reward of the chosen answer minus that of the rejected one, averaged over the "
        "pairs of the last step. A reward is beta times the gain in log-probability over the reference model.",
    )
    reward_accuracy: float | None = Field(
        default=None,
        description="Share of the pairs of the last step whose chosen answer has the larger reward. 0 to 1.",
    )
    eval_reward_margin: float | None = Field(
        default=None, description="The same as rewardMargin, for the validation pairs."
    )
    eval_reward_accuracy: float | None = Field(
        default=None, description="The same as rewardAccuracy, for the validation pairs."
    )
    tokens_per_second: float | None = Field(
        default=None, description="Training speed in tokens per second, without padding."
    )
    eta_seconds: int | None = Field(default=None, description="Estimated seconds of training left.")
    skipped_steps: int = Field(
        default=0, description="Steps that had no effect: skipped, or rolled back after a loss spike."
    )
    straggler: StragglerStatus | None = Field(
        default=None, description="Set while a rank is at least 20% slower than the others in most steps."
    )
    message: str = Field(default="", description="What the trainer is doing, e.g. loading the model.")
    update_time: str | None = Field(default=None, description="When this was reported, RFC 3339 in UTC.")


class CheckpointStatus(LenientModel):
    """Describes the newest complete checkpoint in the output."""

    step: int = Field(description="Optimizer step after which it was saved.")
    uri: str = Field(description="Its folder.")
    time: str = Field(description="When it was completed, RFC 3339 in UTC.")


class ArtifactStatus(LenientModel):
    """Describes the result."""

    uri: str = Field(description="Its folder.")
    manifest_digest: str = Field(
        description="sha256:… of finetune/manifest.json, which lists the digest of every file."
    )
    size_bytes: int = Field(description="Total size of the files, in bytes.")


class ScoreStatus(LenientModel):
    """Compares the base model and the result by one score on the test rows."""

    name: str = Field(description="rouge1, rouge2, rougeL, bleu, exactMatch, f1 or perplexity.")
    base: float = Field(description="Score of the base model.")
    tuned: float = Field(description="Score of the result.")
    low: float = Field(description="Lower end of the interval of tuned - base (paired bootstrap, 95%).")
    high: float = Field(description="Upper end of the interval of tuned - base (paired bootstrap, 95%).")


class OverfittingStatus(LenientModel):
    """Describes a validation loss that rises while the training loss falls."""

    best_step: int = Field(description="Step with the lowest validation loss.")
    best_loss: float = Field(description="That validation loss.")
    step: int = Field(description="Step of the last evaluation.")
    loss: float = Field(description="Validation loss at that step.")


class EvaluationStatus(LenientModel):
    """Reports losses per supervised token, and scores of generated answers."""

    train_loss: float | None = Field(default=None, description="Training loss of the last step.")
    eval_loss: float | None = Field(default=None, description="Validation loss of the written weights.")
    eval_reward_margin: float | None = Field(
        default=None, description="With objective dpo: reward margin of the written weights on the validation pairs."
    )
    eval_reward_accuracy: float | None = Field(
        default=None, description="Share of the validation pairs whose chosen answer has the larger reward. 0 to 1."
    )
    test_reward_margin: float | None = Field(
        default=None, description="Reward margin of the written weights on the test pairs."
    )
    test_reward_accuracy: float | None = Field(
        default=None, description="Share of the test pairs whose chosen answer has the larger reward. 0 to 1."
    )
    test_loss_before: float | None = Field(default=None, description="Test loss of the base model.")
    test_loss_after: float | None = Field(default=None, description="Test loss of the result.")
    scored_rows: int | None = Field(default=None, description="Test rows whose generated answers were scored.")
    scores: tuple[ScoreStatus, ...] = Field(
        default=(), description="Scores of the base model and of the result on the test rows."
    )
    overfitting: OverfittingStatus | None = Field(
        default=None, description="Set if the validation loss rises while the training loss falls."
    )

    @property
    def rounded(self) -> EvaluationStatus:
        """A copy with 4 decimals, for people; metrics and the result have the exact values."""
        return self.model_copy(update={name: round(value, 4) for name, value in self if isinstance(value, float)})

    @property
    def headline(self) -> str:
        """The most important figure, as a clause; empty if nothing was measured on test rows."""
        scores = {score.name: score for score in self.scores}
        score = next((scores[name] for name in ("rougeL", "f1", "bleu", "exactMatch") if name in scores), None)
        if score is not None:
            interval = f"{score.low:+.3g} to {score.high:+.3g}"
            return f"{score.name} {score.base:.3g} before, {score.tuned:.3g} after ({interval})"
        if self.test_loss_before is not None and self.test_loss_after is not None:
            return f"test loss {self.test_loss_before:.4g} before, {self.test_loss_after:.4g} after"
        return ""


class ModelStatus(LenientModel):
    """Describes the base model."""

    revision: str | None = Field(default=None, description="Commit that the revision of an hf:// model resolved to.")
    digest: str | None = Field(default=None, description="sha256:… over the digests of the files.")
    license: str | None = Field(
        default=None,
        description="License that the model's README or config.json names, e.g. apache-2.0; unknown if they name none.",
    )
    size_bytes: int | None = Field(default=None, description="Total size of its files, in bytes.")
    parameters: int | None = Field(default=None, description="Total number of parameters.")
    trainable_parameters: int | None = Field(default=None, description="Number of parameters that are trained.")


class DataStatus(LenientModel):
    """Summarizes the rows before training; finetune/data-report.json has the full report."""

    rows: int = Field(default=0, description="Usable training rows.")
    validation_rows: int | None = Field(default=None, description="Validation rows.")
    test_rows: int | None = Field(default=None, description="Test rows.")
    tokens: int | None = Field(default=None, description="Tokens of the training rows.")
    label_share: float | None = Field(default=None, description="Share of these tokens that is supervised. 0 to 1.")
    dropped: int = Field(default=0, description="Rows of all splits that can't be used.")
    duplicates: int = Field(default=0, description="Rows that repeat an earlier row of their split.")
    leaks: int = Field(default=0, description="Rows that are also in another split.")
    truncated: int = Field(default=0, description="Rows that were truncated to maxSequenceLength.")
    warnings: tuple[str, ...] = Field(
        default=(), description="Findings that a person should look at; none of them fails the job."
    )


class FailureStatus(LenientModel):
    """Explains why the last attempt ended."""

    reason: str = Field(description="CamelCase name; docs/troubleshooting.md explains each.")
    message: str = Field(default="", description="What happened.")
    attempt: int = Field(default=0, description="The attempt that failed.")
    rank: int | None = Field(default=None, description="Rank of the process that failed first.")
    exit_code: int | None = Field(default=None, description="Exit code of that process; 128 + n means signal n.")
    log_tail: str = Field(default="", description="Last lines of its log.")
    hint: str = Field(default="", description="What to do.")


class Status(LenientModel):
    """Reports the state of the job, as the operator observes it."""

    observed_generation: int = Field(default=0, description="The generation of spec that this status refers to.")
    phase: Phase = Field(default="Pending", description="Summary of the conditions, for people.")
    message: str = Field(default="", description="One sentence: what the job is waiting for, or how it ended.")
    conditions: tuple[Condition, ...] = Field(
        default=(), description="Complete, Failed, Suspended, Reconciling, Stalled."
    )
    start_time: str | None = Field(default=None, description="When the first attempt was created, RFC 3339 in UTC.")
    completion_time: str | None = Field(default=None, description="When the job succeeded or failed, RFC 3339 in UTC.")
    attempt: int = Field(default=0, description="Number of the current or last attempt, starting at 1.")
    gpus: int = Field(default=0, description="Total number of GPUs.")
    restarts: Restarts = Field(default_factory=Restarts, description="Restarts so far, by cause.")
    restarts_total: int = Field(default=0, description="Total number of restarts so far.")
    progress: ProgressStatus | None = Field(default=None, description="The progress of training.")
    checkpoint: CheckpointStatus | None = Field(default=None, description="The newest complete checkpoint.")
    model: ModelStatus | None = Field(default=None, description="Facts about the base model.")
    data: DataStatus | None = Field(default=None, description="Statistics of the rows.")
    artifact: ArtifactStatus | None = Field(default=None, description="The result.")
    evaluation: EvaluationStatus | None = Field(
        default=None, description="Losses per supervised token, and scores of generated answers."
    )
    failure: FailureStatus | None = Field(default=None, description="Why the last attempt ended.")
