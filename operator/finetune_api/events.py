"""Events: one JSON object a line, appended by a rank to `<scratch>/events/rank-<n>.jsonl`, tailed by the supervisor.

Rank 0 writes all kinds; other ranks write `error` only, and the first one of each node `checkpoint` where they are
written in shards. Rank 0's `step` and `eval` lines are the loss history that is kept beside the adapter. `time` is
seconds since the epoch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from finetune_api.evaluation import Evaluation
from finetune_api.model import LenientModel
from finetune_api.status import DataStatus


class PhaseEvent(LenientModel):
    """What the ranks do now."""

    type: Literal["phase"] = "phase"
    time: float
    phase: Literal["loading", "tokenizing", "training", "evaluating", "saving", "done"]
    detail: str = Field(default="", description="For people, e.g. how many test rows are answered.")


class DecisionEvent(LenientModel):
    """A choice made before the loop starts, with its reason."""

    type: Literal["decision"] = "decision"
    time: float
    topic: str
    choice: str
    reason: str


class DataEvent(LenientModel):
    """What the rows turned out to be; the whole report lies in a file."""

    type: Literal["data"] = "data"
    time: float
    path: str
    data: DataStatus


class PlanEvent(LenientModel):
    """What is going to be computed; known before the first step."""

    type: Literal["plan"] = "plan"
    time: float
    total_steps: int
    start_step: int = Field(default=0, description="Steps already done by earlier attempts.")
    epochs: float
    rows: int
    dropped_rows: int = 0
    tokens_per_epoch: int
    label_tokens_per_epoch: int
    padding_share: float = Field(description="Share of computed positions that hold no token. 0 to 1.")
    computed_share: float = Field(
        default=1.0,
        description="Tokens that are computed for each token of the examples: less than 1 where what examples begin "
        "with alike is computed once.",
    )
    parameters: int
    trainable_parameters: int
    halvings: int = Field(default=0, description="How often micro-batches were halved for want of memory.")


class Rewards(LenientModel):
    """Of objective dpo, means over pairs, by TRL's names: a reward is beta times what an answer's log p gained on the
    reference."""

    chosen: float
    rejected: float
    margins: float = Field(description="chosen - rejected.")
    accuracies: float = Field(description="Share of pairs whose chosen answer has the larger reward. 0 to 1.")
    logps_chosen: float = Field(description="log p, summed over the answer's tokens.")
    logps_rejected: float


class StepEvent(LenientModel):
    """One optimizer step, all ranks together."""

    type: Literal["step"] = "step"
    time: float
    step: int = Field(description="Steps done, this one included: 1 … totalSteps.")
    epoch: float
    loss: float = Field(description="Mean over all supervised tokens of the global batch.")
    learning_rate: float
    grad_norm: float = Field(description="Global L2 norm before clipping.")
    tokens: int = Field(description="Tokens of this step, padding not counted, all ranks.")
    label_tokens: int
    samples: int
    seconds: dict[str, float] = Field(description="Wall time by part: data, forward, backward, optimizer, total.")
    rewards: Rewards | None = None


class EvalEvent(LenientModel):
    """Mean loss per supervised token over a whole split; independent of batch size and ranks."""

    type: Literal["eval"] = "eval"
    time: float
    step: int
    split: Literal["validation", "test"]
    loss: float
    label_tokens: int
    rewards: Rewards | None = None


class CheckpointEvent(LenientModel):
    """A complete local checkpoint, or this node's part of one, ready to be uploaded."""

    type: Literal["checkpoint"] = "checkpoint"
    time: float
    step: int
    path: str
    seconds: float = Field(description="From the copying of its tensors until it was complete.")
    stall_seconds: float = Field(default=0.0, description="Of these, how long training stood still for it.")
    bytes: int


class SkippedEvent(LenientModel):
    """Steps `first` to `step` change nothing: refused before the optimizer, or undone after a loss spike."""

    type: Literal["skipped"] = "skipped"
    time: float
    step: int
    first: int
    reason: Literal["NonFiniteLoss", "NonFiniteGradient", "LossSpike"]
    rows: tuple[int, ...] = Field(default=(), description="Lines of dataset.uri in the micro-batches that went wrong.")


class SpikeEvent(LenientModel):
    """The loss left the ones before it behind."""

    type: Literal["spike"] = "spike"
    time: float
    step: int
    loss: float
    limit: float
    action: Literal["report", "rollback", "fail"]


class BackoffEvent(LenientModel):
    """A micro-batch had no memory: from this step on they are half as large, and twice as many."""

    type: Literal["backoff"] = "backoff"
    time: float
    step: int
    halvings: int = Field(description="Since the job's first attempt, this one included.")
    choice: str
    why: str


class SampleEvent(LenientModel):
    """An answer before and after, for people to read."""

    type: Literal["sample"] = "sample"
    time: float
    index: int
    prompt: str
    reference: str
    before: str
    after: str
    row: int | None = Field(default=None, description="Line of dataset.test.uri.")


class ScoresEvent(LenientModel):
    """Base model and result on the test rows, once both are known."""

    type: Literal["scores"] = "scores"
    time: float
    evaluation: Evaluation


class TrackingEvent(LenientModel):
    """What a tracker (mlflow, wandb) tells of itself: where it records, or once in an outage that it can't."""

    type: Literal["tracking"] = "tracking"
    time: float
    tracker: str
    state: Literal["recording", "failing", "done"]
    message: str


class SavedEvent(LenientModel):
    """The result lies complete in a local folder, ready to be uploaded."""

    type: Literal["saved"] = "saved"
    time: float
    path: str
    step: int = Field(description="The step whose weights were written.")


class PreemptedEvent(LenientModel):
    """All ranks agreed to stop after this step, and its checkpoint is complete."""

    type: Literal["preempted"] = "preempted"
    time: float
    step: int


class ErrorEvent(LenientModel):
    """A rank is about to end by an exception."""

    type: Literal["error"] = "error"
    time: float
    rank: int
    reason: str = Field(description="A name of reasons.REASONS.")
    message: str
    traceback: str = ""


Event = Annotated[
    PhaseEvent
    | DecisionEvent
    | DataEvent
    | PlanEvent
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
    | PreemptedEvent
    | ErrorEvent,
    Field(discriminator="type"),
]

_adapter: TypeAdapter[Event] = TypeAdapter(Event)


def encode(event: Event) -> str:
    """One line without its newline."""
    return _adapter.dump_json(event, by_alias=True, exclude_none=True).decode()


def decode(line: str | bytes) -> Event | None:
    """The event in a complete line, or None for a torn or unknown one."""
    try:
        return _adapter.validate_json(line)
    except ValidationError:
        return None
