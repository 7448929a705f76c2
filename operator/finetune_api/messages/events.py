"""Defines the events that ranks report to the supervisor, one JSON object per line.

A rank appends them to `<scratch>/events/rank-<n>.jsonl`, which the supervisor tails. Rank 0 writes
all types; other ranks only write `error`, and the first one of each node also `checkpoint` if
checkpoints are sharded. Rank 0's `step` and `eval` lines are the loss history that is stored next
to the result. `time` is in seconds since the epoch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from finetune_api.base import LenientModel
from finetune_api.messages.evaluation import Evaluation
from finetune_api.messages.rank_events import NetworkEvent as NetworkEvent
from finetune_api.messages.rank_events import RankSeconds as RankSeconds
from finetune_api.messages.rank_events import StragglerEvent as StragglerEvent
from finetune_api.status import DataStatus


class PhaseEvent(LenientModel):
    """Reports what the ranks are doing now."""

    type: Literal["phase"] = "phase"
    time: float
    phase: Literal["loading", "tokenizing", "training", "evaluating", "saving", "done"]
    detail: str = Field(default="", description="Detail for people, e.g. how many test rows have been answered.")


class DecisionEvent(LenientModel):
    """Reports a choice made before the training loop starts, with its reason."""

    type: Literal["decision"] = "decision"
    time: float
    topic: str
    choice: str
    reason: str


class DataEvent(LenientModel):
    """Reports statistics of the rows; the full report is in the file `path`."""

    type: Literal["data"] = "data"
    time: float
    path: str
    data: DataStatus


class PlanEvent(LenientModel):
    """Reports what is going to be computed, before the first step."""

    type: Literal["plan"] = "plan"
    time: float
    total_steps: int
    start_step: int = Field(default=0, description="Steps that earlier attempts finished.")
    epochs: float
    rows: int
    dropped_rows: int = 0
    tokens_per_epoch: int
    label_tokens_per_epoch: int
    padding_share: float = Field(description="Share of computed positions that hold no token. 0 to 1.")
    computed_share: float = Field(
        default=1.0,
        description="Computed tokens divided by the tokens of the examples: less than 1 if shared prefixes are "
        "computed once.",
    )
    parameters: int
    trainable_parameters: int
    halvings: int = Field(default=0, description="How often micro-batches were halved for lack of memory.")
    smallest_micro_batches: bool = Field(
        default=False, description="Whether the largest micro-batch is a single example, so that it can't be halved."
    )
    flops_per_token: float | None = Field(
        default=None, description="Floating-point operations that one token needs; None if they aren't known."
    )
    peak_flops: float | None = Field(
        default=None, description="Peak FLOP/s of a rank's GPU in the chosen dtype; None if it isn't known."
    )


class Rewards(LenientModel):
    """Contains means over preference pairs (objective dpo), with TRL's names.

    The reward of an answer is beta * (log p - log p of the reference model).
    """

    chosen: float
    rejected: float
    margins: float = Field(description="chosen - rejected.")
    accuracies: float = Field(description="Share of pairs whose chosen answer has the larger reward. 0 to 1.")
    logps_chosen: float = Field(description="log p, summed over the answer's tokens.")
    logps_rejected: float


class StepEvent(LenientModel):
    """Reports one optimizer step of all ranks together."""

    type: Literal["step"] = "step"
    time: float
    step: int = Field(description="Finished steps, including this one: 1 … totalSteps.")
    epoch: float
    loss: float = Field(description="Mean over all supervised tokens of the global batch.")
    learning_rate: float
    grad_norm: float = Field(description="Global L2 norm before clipping.")
    tokens: int = Field(description="Tokens of this step on all ranks, without padding.")
    label_tokens: int
    samples: int
    seconds: dict[str, float] = Field(
        description="Wall time by part: data, forward, backward, optimizer, total. On a GPU, the parts are the time "
        "that it needs for them, and optimizer is that of the step before."
    )
    rewards: Rewards | None = None
    ranks: RankSeconds | None = Field(
        default=None, description="Absent with one rank, and if ranks wait for each other within a step."
    )


class EvalEvent(LenientModel):
    """Reports the mean loss per supervised token of a complete split.

    It doesn't depend on the batch size or the number of ranks.
    """

    type: Literal["eval"] = "eval"
    time: float
    step: int
    split: Literal["validation", "test"]
    loss: float
    label_tokens: int
    rewards: Rewards | None = None


class CheckpointEvent(LenientModel):
    """Reports a complete local checkpoint, or this node's part of one, that is ready for upload."""

    type: Literal["checkpoint"] = "checkpoint"
    time: float
    step: int
    path: str
    seconds: float = Field(description="Time from copying its tensors until it was complete.")
    stall_seconds: float = Field(default=0.0, description="How much of this time training waited for it.")
    bytes: int


SkipReason = Literal["NonFiniteLoss", "NonFiniteGradient", "LossSpike"]


class SkippedEvent(LenientModel):
    """Reports that steps `first` to `step` have no effect.

    They were skipped before the optimizer step, or rolled back after a loss spike.
    """

    type: Literal["skipped"] = "skipped"
    time: float
    step: int
    first: int
    reason: SkipReason
    rows: tuple[int, ...] = Field(default=(), description="Lines of dataset.uri in the faulty micro-batches.")


class SpikeEvent(LenientModel):
    """Reports a loss spike: the loss exceeds its limit."""

    type: Literal["spike"] = "spike"
    time: float
    step: int
    loss: float
    limit: float
    action: Literal["report", "rollback", "fail"]


class BackoffEvent(LenientModel):
    """Reports that memory ran out: from this step on, micro-batches are half as large."""

    type: Literal["backoff"] = "backoff"
    time: float
    step: int
    halvings: int = Field(description="Halvings since the first attempt of the job, including this one.")
    choice: str
    why: str


class SampleEvent(LenientModel):
    """Shows the answers of the base model and of the result to one test prompt."""

    type: Literal["sample"] = "sample"
    time: float
    index: int
    prompt: str
    reference: str
    before: str
    after: str
    row: int | None = Field(default=None, description="Line of dataset.test.uri.")


class ScoresEvent(LenientModel):
    """Reports the scores of the base model and of the result on the test rows."""

    type: Literal["scores"] = "scores"
    time: float
    evaluation: Evaluation


class TrackingEvent(LenientModel):
    """Reports the state of a tracker (mlflow, wandb).

    The message says where the tracker records the run or, once per outage, that it can't.
    """

    type: Literal["tracking"] = "tracking"
    time: float
    tracker: str
    state: Literal["recording", "failing", "done"]
    message: str


class SavedEvent(LenientModel):
    """Reports that the result is complete in a local folder and ready for upload."""

    type: Literal["saved"] = "saved"
    time: float
    path: str
    step: int = Field(description="The step whose weights were written.")


class OriginEvent(LenientModel):
    """Reports which checkpoint or adapter of another job the run started from; a line of the
    history."""

    type: Literal["origin"] = "origin"
    time: float
    step: int = Field(description="Step of this run at which it started: 0 with weights only.")
    use: Literal["trainingState", "weights"]
    uri: str
    job: str = Field(description="Namespace and name of the other job.")
    uid: str
    checkpoint_step: int = Field(description="Step of the other job after which it was saved.")
    manifest_digest: str = Field(description="sha256:… of its manifest.")


class PreemptedEvent(LenientModel):
    """Reports that all ranks agreed to stop after this step and saved a checkpoint."""

    type: Literal["preempted"] = "preempted"
    time: float
    step: int


class ErrorEvent(LenientModel):
    """Reports that a rank is about to exit because of an exception."""

    type: Literal["error"] = "error"
    time: float
    rank: int
    reason: str = Field(description="A name in reasons.REASONS.")
    message: str
    traceback: str = ""


Event = Annotated[
    PhaseEvent
    | DecisionEvent
    | DataEvent
    | PlanEvent
    | NetworkEvent
    | StragglerEvent
    | StepEvent
    | EvalEvent
    | CheckpointEvent
    | SkippedEvent
    | SpikeEvent
    | BackoffEvent
    | SampleEvent
    | ScoresEvent
    | TrackingEvent
    | SavedEvent
    | OriginEvent
    | PreemptedEvent
    | ErrorEvent,
    Field(discriminator="type"),
]

_adapter: TypeAdapter[Event] = TypeAdapter(Event)


def encode(event: Event) -> str:
    """Encodes an event as a line without its newline."""
    return _adapter.dump_json(event, by_alias=True, exclude_none=True).decode()


def decode(line: str | bytes) -> Event | None:
    """Parses a complete line; None if it is damaged or of an unknown type."""
    try:
        return _adapter.validate_json(line)
    except ValidationError:
        return None
