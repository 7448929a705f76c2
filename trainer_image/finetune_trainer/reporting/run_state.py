"""Computes the state of a run from its events: `after(state, event)` returns the next state.

The module is pure: it reads no file and no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from finetune_api.messages import events as e
from finetune_api.messages.evaluation import Evaluation
from finetune_api.status import DataStatus, EvaluationStatus, OverfittingStatus
from finetune_trainer.reporting.overfitting import Point, signal

_SPEED_STEPS = 20


@dataclass(frozen=True)
class Checkpoint:
    """Describes a complete checkpoint in a local folder."""

    step: int
    path: str
    bytes: int


@dataclass(frozen=True)
class RunState:
    """Holds all that is known of a run.

    `origins` are the checkpoints of other jobs that it started from, the oldest first.
    `step` counts from the job's first attempt, `steps_here` from the start of this one. Losses are
    means per supervised token, or per preference pair for objective dpo. `since_eval` is the sum
    and the number of the training losses since the last evaluation, `recent` holds (tokens,
    seconds) of the last steps, and `skipped` holds (first step, last step) of steps that changed
    nothing. `straggler` is the rank that is slower than the others now.
    """

    phase: str = "starting"
    data: DataStatus | None = None
    data_report: str = ""
    plan: e.PlanEvent | None = None
    step: int = 0
    steps_here: int = 0
    last: e.StepEvent | None = None
    tokens: int = 0
    samples: int = 0
    evals: dict[int, e.EvalEvent] = field(default_factory=dict)
    evaluated: e.EvalEvent | None = None
    test_before: e.EvalEvent | None = None
    test_after: e.EvalEvent | None = None
    checkpoint: Checkpoint | None = None
    saved: e.SavedEvent | None = None
    preempted: e.PreemptedEvent | None = None
    samples_shown: tuple[e.SampleEvent, ...] = ()
    scored: Evaluation | None = None
    since_eval: tuple[float, int] = (0.0, 0)
    points: tuple[Point, ...] = ()
    decisions: tuple[e.DecisionEvent, ...] = ()
    origins: tuple[e.OriginEvent, ...] = ()
    recent: tuple[tuple[int, float], ...] = ()
    skipped: tuple[tuple[int, int], ...] = ()
    spikes: int = 0
    halvings: int = 0
    straggler: e.StragglerEvent | None = None

    @property
    def skipped_steps(self) -> int:
        """The number of steps that changed nothing, in all attempts."""
        return sum(last - first + 1 for first, last in self.skipped)

    @property
    def total_steps(self) -> int:
        """The steps of the full run; 0 until the plan is known."""
        return self.plan.total_steps if self.plan else 0

    @property
    def overfitting(self) -> OverfittingStatus | None:
        """The status of overfitting; None if the model doesn't overfit."""
        return signal(self.points)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the last 20 steps, without evaluations and checkpoints."""
        seconds = sum(seconds for _, seconds in self.recent)
        return sum(tokens for tokens, _ in self.recent) / seconds if seconds > 0 else None

    @property
    def eta_seconds(self) -> int | None:
        """Seconds until the last step: the steps that remain times the mean of the last 20."""
        if not self.recent or not self.total_steps:
            return None
        mean = sum(seconds for _, seconds in self.recent) / len(self.recent)
        return round(mean * max(0, self.total_steps - self.step))

    @property
    def evaluation(self) -> EvaluationStatus | None:
        """The losses and scores of the weights that were saved; before that, the latest ones."""
        validation = self.evals.get(self.saved.step, self.evaluated) if self.saved else self.evaluated
        if all(event is None for event in (self.last, validation, self.test_before, self.test_after)):
            return None
        scored = self.scored or Evaluation()
        return EvaluationStatus(
            scored_rows=scored.answered or None,
            scores=tuple(score.status for score in scored.scores),
            overfitting=self.overfitting,
            train_loss=loss(self.last),
            eval_loss=loss(validation),
            eval_reward_margin=margin(validation),
            eval_reward_accuracy=accuracy(validation),
            test_loss_before=loss(self.test_before),
            test_loss_after=loss(self.test_after),
            test_reward_margin=margin(self.test_after),
            test_reward_accuracy=accuracy(self.test_after),
        )


def loss(event: e.StepEvent | e.EvalEvent | None) -> float | None:
    """Returns the event's loss, or None if there is no event."""
    return event.loss if event else None


def margin(event: e.StepEvent | e.EvalEvent | None) -> float | None:
    """Returns the event's mean reward margin; None unless the objective is dpo."""
    return event.rewards.margins if event and event.rewards else None


def accuracy(event: e.StepEvent | e.EvalEvent | None) -> float | None:
    """Returns the event's reward accuracy, 0 to 1; None unless the objective is dpo."""
    return event.rewards.accuracies if event and event.rewards else None


def after(state: RunState, event: e.Event, *, restored: bool = False) -> RunState:
    """Returns the state after `event`. Set `restored` for an event of an earlier attempt."""
    match event:
        case e.PhaseEvent():
            return replace(state, phase=event.phase)
        case e.DataEvent():
            return replace(state, data=event.data, data_report=event.path)
        case e.PlanEvent():
            return replace(state, plan=event, step=max(state.step, event.start_step), halvings=event.halvings)
        case e.StepEvent():
            recent = () if restored else (*state.recent, (event.tokens, event.seconds.get("total", 0.0)))
            return replace(
                state,
                step=event.step,
                steps_here=state.steps_here + (not restored),
                last=event,
                since_eval=(state.since_eval[0] + event.loss, state.since_eval[1] + 1),
                tokens=state.tokens + event.tokens,
                samples=state.samples + event.samples,
                recent=recent[-_SPEED_STEPS:],
            )
        case e.EvalEvent():
            return _evaluated(state, event)
        case e.CheckpointEvent():
            return replace(state, checkpoint=Checkpoint(event.step, event.path, event.bytes))
        case e.SampleEvent():
            others = tuple(sample for sample in state.samples_shown if sample.index != event.index)
            return replace(state, samples_shown=(*others, event))
        case e.ScoresEvent():
            return replace(state, scored=event.evaluation)
        case e.SavedEvent():
            return replace(state, saved=event)
        case e.PreemptedEvent():
            return replace(state, preempted=event)
        case e.SkippedEvent():
            refused = event.reason != "LossSpike"  # the steps that a rollback discards were already counted
            earlier = tuple(part for part in state.skipped if part[0] < event.first)
            return replace(
                state,
                step=event.step,
                steps_here=state.steps_here + (refused and not restored),
                skipped=(*earlier, (event.first, event.step)),
            )
        case e.SpikeEvent():
            return replace(state, spikes=state.spikes + 1)
        case e.BackoffEvent():
            return replace(state, halvings=event.halvings)
        case e.OriginEvent():
            return replace(state, origins=(*state.origins, event))
        case e.StragglerEvent():
            return replace(state, straggler=None if event.ended else event)
        case e.DecisionEvent():
            return replace(state, decisions=(*state.decisions, event))
        case e.ErrorEvent() | e.TrackingEvent() | e.NetworkEvent():
            return state


def restored(history: tuple[e.StepEvent | e.EvalEvent | e.SkippedEvent | e.OriginEvent, ...], step: int) -> RunState:
    """Returns the state at checkpoint `step`, computed from the history that was stored with it."""
    state = RunState()
    for event in history:
        state = after(state, event, restored=True)
    return replace(state, step=step)


def _evaluated(state: RunState, event: e.EvalEvent) -> RunState:
    if event.split == "validation":
        total, count = state.since_eval
        earlier = tuple(point for point in state.points if point.step < event.step)
        point = Point(event.step, event.loss, total / count if count else math.inf)
        return replace(
            state,
            evaluated=event,
            evals={**state.evals, event.step: event},
            since_eval=(0.0, 0),
            points=(*earlier, point),
        )
    if event.step == 0 and state.test_before is None:
        return replace(state, test_before=event)
    return replace(state, test_after=event)
