"""The status of a FineTuneJob: what the operator writes, in the words of batch/v1 Job and kstatus.

Written by finetune_operator.status, read by the command line. Lenient, since an older operator may read what a
newer one wrote.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.model import LenientModel

Phase = Literal["Pending", "Queued", "Starting", "Running", "Restarting", "Suspended", "Succeeded", "Failed"]
TERMINAL_PHASES = ("Succeeded", "Failed")

CONDITION_COMPLETE = "Complete"
CONDITION_FAILED = "Failed"
CONDITION_SUSPENDED = "Suspended"
CONDITION_RECONCILING = "Reconciling"
CONDITION_STALLED = "Stalled"


class Condition(LenientModel):
    """As in the Kubernetes API conventions."""

    type: str = Field(description="Complete, Failed, Suspended, Reconciling or Stalled.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    observed_generation: int = Field(default=0, description="The generation that this condition speaks of.")
    last_transition_time: str = Field(description="When status last changed, RFC 3339 in UTC.")
    reason: str = Field(description="CamelCase word for programs.")
    message: str = Field(default="", description="Sentence for people.")


class Restarts(LenientModel):
    """Restarts of the whole group so far, by cause."""

    application: int = Field(default=0, description="Failures of the training program itself.")
    infrastructure: int = Field(default=0, description="Failures of nodes, network and storage.")
    preemption: int = Field(default=0, description="Evictions and preemptions; they cost no budget.")


class ProgressStatus(LenientModel):
    """Where training stands; written at most every 30 s."""

    step: int = Field(default=0, description="Optimizer steps done.")
    total_steps: int = Field(default=0, description="Optimizer steps in all.")
    percent: int = Field(default=0, description="step / totalSteps, 0 to 100.")
    epoch: float = Field(default=0.0, description="Passes over the data done.")
    train_loss: float | None = Field(default=None, description="Mean loss per supervised token of the last step.")
    eval_loss: float | None = Field(default=None, description="Mean loss per supervised token of the validation rows.")
    reward_margin: float | None = Field(
        default=None,
        description="Of objective dpo: how much larger the chosen answer's reward is, mean over the last step's pairs. "
        "A reward is beta times what an answer's log-probability gained on the reference.",
    )
    reward_accuracy: float | None = Field(
        default=None, description="Share of the last step's pairs whose chosen answer has the larger reward, 0 to 1."
    )
    eval_reward_margin: float | None = Field(default=None, description="rewardMargin of the validation pairs.")
    eval_reward_accuracy: float | None = Field(default=None, description="rewardAccuracy of the validation pairs.")
    tokens_per_second: float | None = Field(default=None, description="Tokens a second, padding not counted.")
    eta_seconds: int | None = Field(default=None, description="Seconds of training left.")
    skipped_steps: int = Field(default=0, description="Steps that changed nothing: refused, or undone after a spike.")
    message: str = Field(default="", description="What it is doing, e.g. loading the model.")
    update_time: str | None = Field(default=None, description="When this was reported, RFC 3339 in UTC.")


class CheckpointStatus(LenientModel):
    """The newest complete checkpoint in the destination."""

    step: int = Field(description="Optimizer step after which it was taken.")
    uri: str = Field(description="Its folder.")
    time: str = Field(description="When it was complete, RFC 3339 in UTC.")


class ArtifactStatus(LenientModel):
    """The result."""

    uri: str = Field(description="Its folder.")
    manifest_digest: str = Field(description="sha256:… of finetune/manifest.json, which lists every file's digest.")
    size_bytes: int = Field(description="All files together, in bytes.")


class ScoreStatus(LenientModel):
    """One score on the test rows: the base model's, the result's, and how sure their difference is."""

    name: str = Field(description="rouge1, rouge2, rougeL, bleu, exactMatch, f1 or perplexity.")
    base: float = Field(description="The base model's.")
    tuned: float = Field(description="The result's.")
    low: float = Field(description="tuned - base is at least this (paired bootstrap, 95 %).")
    high: float = Field(description="tuned - base is at most this (paired bootstrap, 95 %).")


class OverfittingStatus(LenientModel):
    """The validation loss rises while the training loss falls."""

    best_step: int = Field(description="Step with the lowest validation loss.")
    best_loss: float = Field(description="That validation loss.")
    step: int = Field(description="Step of the last evaluation.")
    loss: float = Field(description="Validation loss there.")


class EvaluationStatus(LenientModel):
    """Losses per supervised token, and scores of generated answers."""

    train_loss: float | None = Field(default=None, description="Last step's training loss.")
    eval_loss: float | None = Field(default=None, description="Validation loss of the weights that were written.")
    eval_reward_margin: float | None = Field(
        default=None, description="Of objective dpo: reward margin of the validation pairs, of what was written."
    )
    eval_reward_accuracy: float | None = Field(
        default=None, description="Share of the validation pairs whose chosen answer has the larger reward, 0 to 1."
    )
    test_reward_margin: float | None = Field(default=None, description="Reward margin of the test pairs.")
    test_reward_accuracy: float | None = Field(default=None, description="That share of the test pairs.")
    test_loss_before: float | None = Field(default=None, description="Test loss of the base model.")
    test_loss_after: float | None = Field(default=None, description="Test loss of the result.")
    scored_rows: int | None = Field(default=None, description="Test rows whose generated answers were scored.")
    scores: tuple[ScoreStatus, ...] = Field(default=(), description="Base model and result on the test rows.")
    overfitting: OverfittingStatus | None = Field(
        default=None, description="Set where the validation loss rises while the training loss falls."
    )

    @property
    def legible(self) -> EvaluationStatus:
        """As a person reads it in `kubectl get`; the exact values are in the metrics and the result."""
        return self.model_copy(update={name: round(value, 4) for name, value in self if isinstance(value, float)})

    @property
    def headline(self) -> str:
        """The figure that people ask for first, in a clause; empty where nothing was measured on test rows."""
        known = {score.name: score for score in self.scores}
        first = next((known[name] for name in ("rougeL", "f1", "bleu", "exactMatch") if name in known), None)
        if first is not None:
            between = f"{first.low:+.3g} to {first.high:+.3g}"
            return f"{first.name} {first.base:.3g} before, {first.tuned:.3g} after ({between})"
        if self.test_loss_before is not None and self.test_loss_after is not None:
            return f"test loss {self.test_loss_before:.4g} before, {self.test_loss_after:.4g} after"
        return ""


class ModelStatus(LenientModel):
    """What the base model turned out to be."""

    revision: str | None = Field(default=None, description="Commit that an hf:// revision resolved to.")
    digest: str | None = Field(default=None, description="sha256:… over the files' digests.")
    license: str | None = Field(
        default=None,
        description="As the model's README or config.json says, e.g. apache-2.0; unknown where they don't.",
    )
    parameters: int | None = Field(default=None, description="Parameters in all.")
    trainable_parameters: int | None = Field(default=None, description="Parameters that are trained.")


class DataStatus(LenientModel):
    """What the rows turned out to be, before training; the whole of it is in finetune/data-report.json."""

    rows: int = Field(default=0, description="Usable training rows.")
    validation_rows: int | None = Field(default=None, description="Validation rows.")
    test_rows: int | None = Field(default=None, description="Test rows.")
    tokens: int | None = Field(default=None, description="Tokens of the training rows.")
    label_share: float | None = Field(default=None, description="Share of these that is learnt, 0 to 1.")
    dropped: int = Field(default=0, description="Rows that can't be used, of all splits.")
    duplicates: int = Field(default=0, description="Rows that came before in their split.")
    leaks: int = Field(default=0, description="Rows that another split holds too.")
    truncated: int = Field(default=0, description="Rows that were cut to maxSequenceLength.")
    warnings: tuple[str, ...] = Field(
        default=(), description="What a person should look at; nothing is refused for it."
    )


class FailureStatus(LenientModel):
    """Why the last attempt ended."""

    reason: str = Field(description="CamelCase word; each is explained in docs/troubleshooting.md.")
    message: str = Field(default="", description="What happened.")
    attempt: int = Field(default=0, description="The attempt that failed.")
    rank: int | None = Field(default=None, description="Process that failed first.")
    exit_code: int | None = Field(default=None, description="Its exit code; 128 + n is signal n.")
    log_tail: str = Field(default="", description="Its last lines.")
    hint: str = Field(default="", description="What to do.")


class Status(LenientModel):
    """What the operator has seen and done."""

    observed_generation: int = Field(default=0, description="The generation of spec that this status speaks of.")
    phase: Phase = Field(default="Pending", description="Summary of the conditions for people.")
    message: str = Field(default="", description="One sentence: what it waits for, or how it ended.")
    conditions: tuple[Condition, ...] = Field(
        default=(), description="Complete, Failed, Suspended, Reconciling, Stalled."
    )
    start_time: str | None = Field(default=None, description="When the first attempt was created, RFC 3339 in UTC.")
    completion_time: str | None = Field(default=None, description="When the job ended, either way, RFC 3339 in UTC.")
    attempt: int = Field(default=0, description="Number of the current or last attempt, from 1.")
    gpus: int = Field(default=0, description="GPUs in all.")
    restarts: Restarts = Field(default_factory=Restarts, description="Restarts so far, by cause.")
    restarts_total: int = Field(default=0, description="Restarts so far.")
    progress: ProgressStatus | None = Field(default=None, description="Where training stands.")
    checkpoint: CheckpointStatus | None = Field(default=None, description="The newest complete checkpoint.")
    model: ModelStatus | None = Field(default=None, description="What the base model turned out to be.")
    data: DataStatus | None = Field(default=None, description="What the rows turned out to be.")
    artifact: ArtifactStatus | None = Field(default=None, description="The result.")
    evaluation: EvaluationStatus | None = Field(
        default=None, description="Losses per supervised token, and scores of generated answers."
    )
    failure: FailureStatus | None = Field(default=None, description="Why the last attempt ended.")
