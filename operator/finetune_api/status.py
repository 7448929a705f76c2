"""Defines the status of a FineTuneJob, which follows the conventions of batch/v1 Job and kstatus.

Models are lenient, since an older operator may read what a newer one wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from finetune_api import untrusted as u
from finetune_api.base import LenientModel

Phase = Literal["Pending", "Queued", "Starting", "Running", "Restarting", "Suspended", "Succeeded", "Failed"]
TERMINAL_PHASES = ("Succeeded", "Failed")
MAX_SIGNERS = 64
CONDITION_COMPLETE = "Complete"
CONDITION_FAILED = "Failed"
CONDITION_SUSPENDED = "Suspended"
CONDITION_RECONCILING = "Reconciling"
CONDITION_STALLED = "Stalled"
CONDITION_CHECKPOINTS_STORED = "CheckpointsStored"  # only once the trainer has tried to store one


class Condition(LenientModel):
    """Describes a condition, by the Kubernetes API conventions."""

    type: u.ShortLine = Field(description="Complete, Failed, Suspended, Reconciling, Stalled or CheckpointsStored.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    observed_generation: u.Count = Field(default=0, description="The generation that this condition refers to.")
    last_transition_time: u.Time = Field(description="When status last changed, RFC 3339 in UTC.")
    reason: u.ReasonName = Field(description="CamelCase name, for programs.")
    message: u.Line = Field(default="", description="A sentence, for people.")


class Restarts(LenientModel):
    """Counts the restarts of the whole group so far, by cause."""

    application: u.Count = Field(default=0, description="Failures of the training program itself.")
    memory: u.Count = Field(default=0, description="Lacks of memory, each of which halved the micro-batches.")
    infrastructure: u.Count = Field(default=0, description="Failures of nodes, network and storage.")
    preemption: u.Count = Field(default=0, description="Evictions and preemptions.")


class StragglerStatus(LenientModel):
    """Names a rank that stays slower than the others."""

    rank: u.Count = Field(description="Number of the rank.")
    node: u.Count = Field(description="Number of its pod, which is the last one in the pod's name.")
    ratio: u.Figure = Field(description="Its time per token divided by the median of the other ranks.")


class ProgressStatus(LenientModel):
    """Reports the progress of training. It is written within 3 s of the first step and of another
    phase of the trainer, and within 10 s of a change that comes less often than every 30 s;
    otherwise every 10 s at first, and every minute after 5 minutes."""

    attempt: u.Count = Field(default=0, description="The attempt that reported it.")
    phase: u.ShortLine = Field(default="", description="Phase of the trainer, e.g. loading, training or uploading.")
    step: u.Count = Field(default=0, description="Finished optimizer steps.")
    total_steps: u.Count = Field(default=0, description="Total number of optimizer steps.")
    percent: u.Count = Field(default=0, description="step / totalSteps, 0 to 100.")
    epoch: u.Figure = Field(default=0.0, description="Finished passes over the data.")
    train_loss: u.Figure | None = Field(
        default=None, description="Training loss of the last step: the mean over its supervised tokens."
    )
    eval_loss: u.Figure | None = Field(
        default=None, description="Validation loss: the mean over the supervised tokens of all rows."
    )
    reward_margin: u.Figure | None = Field(
        default=None,
        description="With objective dpo: reward of the chosen answer minus that of the rejected one, averaged over the "
        "pairs of the last step. A reward is beta times the gain in log-probability over the reference model.",
    )
    reward_accuracy: u.Ratio | None = Field(
        default=None,
        description="Share of the pairs of the last step whose chosen answer has the larger reward. 0 to 1.",
    )
    eval_reward_margin: u.Figure | None = Field(
        default=None, description="The same as rewardMargin, for the validation pairs."
    )
    eval_reward_accuracy: u.Ratio | None = Field(
        default=None, description="The same as rewardAccuracy, for the validation pairs."
    )
    tokens_per_second: u.Figure | None = Field(
        default=None, description="Training speed in tokens per second, without padding."
    )
    eta_seconds: u.Count | None = Field(default=None, description="Estimated seconds of training left.")
    eta: u.ShortLine = Field(default="", description="The same for people, e.g. 3h20m; empty if nothing is left.")
    skipped_steps: u.Count = Field(
        default=0, description="Steps that had no effect: skipped, or rolled back after a loss spike."
    )
    straggler: StragglerStatus | None = Field(
        default=None, description="Set while a rank is at least 20% slower than the others in most steps."
    )
    message: u.Line = Field(default="", description="What the trainer is doing, e.g. loading the model.")
    update_time: u.Time | None = Field(default=None, description="When this was reported, RFC 3339 in UTC.")


class CheckpointStatus(LenientModel):
    """Describes the newest complete checkpoint in the output."""

    step: u.Count = Field(description="Optimizer step after which it was saved.")
    uri: u.Line = Field(description="Its folder.")
    time: u.Time = Field(description="When it was completed, RFC 3339 in UTC.")


class ArtifactStatus(LenientModel):
    """Describes the result."""

    uri: u.Line = Field(description="Its folder.")
    manifest_digest: u.ShortLine = Field(
        description="sha256:… of finetune/manifest.json, which lists the digest of every file."
    )
    size_bytes: u.Count = Field(description="Total size of the files, in bytes.")


class ScoreStatus(LenientModel):
    """Compares the base model and the result by one score on the test rows."""

    name: u.ShortLine = Field(description="rouge1, rouge2, rougeL, bleu, exactMatch, f1 or perplexity.")
    base: u.Figure = Field(description="Score of the base model.")
    tuned: u.Figure = Field(description="Score of the result.")
    low: u.Figure = Field(description="Lower end of the interval of tuned - base (paired bootstrap, 95%).")
    high: u.Figure = Field(description="Upper end of the interval of tuned - base (paired bootstrap, 95%).")


class OverfittingStatus(LenientModel):
    """Describes a validation loss that rises while the training loss falls."""

    best_step: u.Count = Field(description="Step with the lowest validation loss.")
    best_loss: u.Figure = Field(description="That validation loss.")
    step: u.Count = Field(description="Step of the last evaluation.")
    loss: u.Figure = Field(description="Validation loss at that step.")


class EvaluationStatus(LenientModel):
    """Reports losses per supervised token, and scores of generated answers."""

    train_loss: u.Figure | None = Field(default=None, description="Training loss of the last step.")
    eval_loss: u.Figure | None = Field(default=None, description="Validation loss of the written weights.")
    eval_reward_margin: u.Figure | None = Field(
        default=None, description="With objective dpo: reward margin of the written weights on the validation pairs."
    )
    eval_reward_accuracy: u.Ratio | None = Field(
        default=None, description="Share of the validation pairs whose chosen answer has the larger reward. 0 to 1."
    )
    test_reward_margin: u.Figure | None = Field(
        default=None, description="Reward margin of the written weights on the test pairs."
    )
    test_reward_accuracy: u.Ratio | None = Field(
        default=None, description="Share of the test pairs whose chosen answer has the larger reward. 0 to 1."
    )
    test_loss_before: u.Figure | None = Field(default=None, description="Test loss of the base model.")
    test_loss_after: u.Figure | None = Field(default=None, description="Test loss of the result.")
    scored_rows: u.Count | None = Field(default=None, description="Test rows whose generated answers were scored.")
    scores: Annotated[tuple[ScoreStatus, ...], u.at_most(16)] = Field(
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

    revision: u.ShortLine | None = Field(
        default=None, description="Commit that the revision of an hf:// model resolved to."
    )
    digest: u.ShortLine | None = Field(default=None, description="sha256:… over the digests of the files.")
    license: u.ShortLine | None = Field(
        default=None,
        description="License that the model's README or config.json names, e.g. apache-2.0; unknown if they name none.",
    )
    size_bytes: u.Count | None = Field(default=None, description="Total size of its files, in bytes.")
    parameters: u.Count | None = Field(default=None, description="Total number of parameters.")
    trainable_parameters: u.Count | None = Field(default=None, description="Number of parameters that are trained.")


class DataStatus(LenientModel):
    """Summarizes the rows before training; finetune/data-report.json has the full report."""

    rows: u.Count = Field(default=0, description="Usable training rows.")
    validation_rows: u.Count | None = Field(default=None, description="Validation rows.")
    test_rows: u.Count | None = Field(default=None, description="Test rows.")
    tokens: u.Count | None = Field(default=None, description="Tokens of the training rows.")
    label_share: u.Ratio | None = Field(default=None, description="Share of these tokens that is supervised. 0 to 1.")
    dropped: u.Count = Field(default=0, description="Rows of all splits that can't be used.")
    duplicates: u.Count = Field(default=0, description="Rows that repeat an earlier row of their split.")
    leaks: u.Count = Field(default=0, description="Rows that are also in another split.")
    truncated: u.Count = Field(default=0, description="Rows that were truncated to maxSequenceLength.")
    warnings: Annotated[tuple[u.Line, ...], u.at_most(64)] = Field(
        default=(), description="Findings that a person should look at; none of them fails the job."
    )


class FailureStatus(LenientModel):
    """Explains why the last attempt ended."""

    reason: u.ReasonName = Field(description="CamelCase name; docs/troubleshooting.md explains each.")
    message: u.Line = Field(default="", description="What happened.")
    attempt: u.Count = Field(default=0, description="The attempt that failed.")
    rank: u.Rank | None = Field(default=None, description="Rank of the process that failed first.")
    exit_code: u.ExitCode | None = Field(default=None, description="Exit code of that process; 128 + n means signal n.")
    log_tail: u.Lines = Field(default="", description="Last lines of its log.")
    hint: u.Line = Field(default="", description="What to do.")


class Status(LenientModel):
    """Reports the state of the job, as the operator observes it."""

    observed_generation: u.Count = Field(default=0, description="The generation of spec that this status refers to.")
    phase: Phase = Field(default="Pending", description="Summary of the conditions, for people.")
    reason: u.ReasonName = Field(
        default="", description="One word: why the job waits, why it was last restarted, or why it failed."
    )
    message: u.Line = Field(
        default="",
        description="One sentence: what the job is waiting for, what the trainer is doing, or how the job ended. At "
        "most 110 characters; of what it waits for and how it ended, a condition has all of it.",
    )
    conditions: Annotated[tuple[Condition, ...], u.at_most(16)] = Field(
        default=(), description="Complete, Failed, Suspended, Reconciling, Stalled, CheckpointsStored."
    )
    start_time: u.Time | None = Field(default=None, description="When the first attempt was created, RFC 3339 in UTC.")
    completion_time: u.Time | None = Field(
        default=None, description="When the job succeeded or failed, RFC 3339 in UTC."
    )
    paused_since: u.Time | None = Field(
        default=None, description="Since when the job has been suspended or queued, RFC 3339 in UTC."
    )
    paused_seconds: u.Count = Field(
        default=0, description="Seconds for which it was suspended, queued or failed before; no deadline counts them."
    )
    retry: u.Count = Field(default=0, description="The value of runPolicy.retry that has had its effect.")
    attempt: u.Count = Field(default=0, description="Number of the current or last attempt, starting at 1.")
    gpus: u.Count | None = Field(default=None, description="Total number of GPUs; absent without any.")
    restarts: Restarts = Field(default_factory=Restarts, description="Restarts so far, by cause.")
    restarts_total: u.Count = Field(default=0, description="Total number of restarts so far.")
    progress: ProgressStatus | None = Field(default=None, description="The progress of training.")
    checkpoint: CheckpointStatus | None = Field(default=None, description="The newest complete checkpoint.")
    model: ModelStatus | None = Field(default=None, description="Facts about the base model.")
    data: DataStatus | None = Field(default=None, description="Statistics of the rows.")
    artifact: ArtifactStatus | None = Field(default=None, description="The result.")
    signers: Annotated[tuple[u.ShortLine, ...], u.at_most(MAX_SIGNERS)] = Field(
        default=(),
        description="Public keys by which the pods of this job have signed their manifests. Checkpoints and results "
        "that none of them has signed are not used.",
    )
    token_signers: Annotated[tuple[u.ShortLine, ...], u.at_most(MAX_SIGNERS)] = Field(
        default=(), description="Public keys by which preflight pods have signed tokens; others are computed again."
    )
    evaluation: EvaluationStatus | None = Field(
        default=None, description="Losses per supervised token, and scores of generated answers."
    )
    failure: FailureStatus | None = Field(default=None, description="Why the last attempt ended.")


def read(raw: Any) -> Status:
    """Returns a stored status as far as this version can parse it; it never raises.

    Another version may have written it. A top-level field that can't be parsed is left out; a phase
    that this version doesn't know follows from the conditions, so that an ended job stays ended.
    """
    fields = dict(raw) if isinstance(raw, Mapping) else {}
    while True:
        try:
            status = Status.model_validate(fields)
        except ValidationError as error:
            unparsed = {str(detail["loc"][0]) for detail in error.errors(include_url=False) if detail["loc"]}
            if not unparsed & fields.keys():
                return Status()
            fields = {key: value for key, value in fields.items() if key not in unparsed}
        else:
            return status if "phase" in fields else status.model_copy(update={"phase": _phase(status)})


def _phase(status: Status) -> Phase:
    met = {condition.type for condition in status.conditions if condition.status == "True"}
    return "Succeeded" if CONDITION_COMPLETE in met else "Failed" if CONDITION_FAILED in met else "Pending"
