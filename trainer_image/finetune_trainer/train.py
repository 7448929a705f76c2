"""The loop, on one screen: what every rank does for every optimizer step. Called once, by `rank`.

Everything was decided before it starts. Which rows a step learns from is `plan`'s, how ranks work together `learner`'s.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, replace

import torch

from finetune_api import events
from finetune_api.run import RunConfig
from finetune_trainer import checkpoint, guards, preference, schedule, seeds, selection, undo
from finetune_trainer.agreement import Agreed, Micros, agree
from finetune_trainer.batch import Collator
from finetune_trainer.best import BestWeights
from finetune_trainer.checkpoint import State
from finetune_trainer.diagnosis import failed_from
from finetune_trainer.evaluate import Evaluator
from finetune_trainer.failure import Failed
from finetune_trainer.learner import Learner
from finetune_trainer.loss import LossSum
from finetune_trainer.paths import Paths
from finetune_trainer.plan import Plan, Step
from finetune_trainer.reporter import Reporter
from finetune_trainer.saving import Saver
from finetune_trainer.shards import Sharding
from finetune_trainer.split import Split
from finetune_trainer.world import World


@dataclass(frozen=True)
class Training:
    """What the loop needs; the same on every rank."""

    run: RunConfig
    paths: Paths
    world: World
    reporter: Reporter
    plan: Plan
    whole: Plan  # before any halving of its micro-batches
    train: Split
    validation: Split | None
    learner: Learner
    collate: Collator
    loss_sum: LossSum
    sharding: Sharding | None  # None: checkpoints are gathered on rank 0

    @property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.learner, self.plan.shape, self.collate, self.loss_sum, self.world, self.reporter.alive)

    def saver(self) -> Saver:
        recipe, total = self.run.training, self.plan.total_steps
        rolls_back = recipe.loss_spike.action == "rollback"
        cadence, reason = selection.cadence(self.run.checkpoint.every, total, exact=rolls_back)
        self.reporter.decision("checkpoints", str(cadence), reason)
        return Saver(
            self.world,
            self.learner,
            self.reporter,
            self.paths.checkpoints,
            self.run.job,
            cadence,
            best=self.best if recipe.keep_best else None,
            kept=checkpoint.KEPT_LOCALLY + (guards.LASTING if rolls_back else 0),
            sharding=self.sharding,
        )

    @property
    def best(self) -> BestWeights:
        return BestWeights(self.paths.best, self.learner, self.world, self.sharding)


def train(t: Training, state: State) -> tuple[Training, State, bool]:
    """(what is left of the training, the state after the last step done, whether a stop was asked for before the end)

    Where memory ran short, the training that comes back computes less at once than the one that was given.
    """
    total, recipe = t.plan.total_steps, t.run.training
    t.reporter.phase("training")
    t.learner.model.train()
    if t.validation is not None and state.eval_due:
        state = _evaluate(t, t.validation, state)
    with t.saver() as saver:
        while state.step < total and not state.stopped_early:
            clock = _Clock()
            step = t.plan.step(state.step + 1)
            own = _learn(t, step, clock)
            stop_asked, due = t.paths.stop.exists(), saver.due(step.number, total)
            agreed = agree(t.world, step, t.train, own, stop=stop_asked, due=due)
            if agreed.short:
                t, state = _with_smaller_micros(t, state, agreed.short)
                continue
            rate = schedule.learning_rate(step.number, total, recipe)
            norm = t.learner.step(rate) if agreed.finite else _refused(t)
            clock.lap("optimizer")
            state, undone = state.model_copy(update={"step": step.number}), False
            if math.isfinite(norm):
                _report(t, step, agreed, rate, norm, clock.seconds())
                state, undone = undo.after_spike(t, saver, state, agreed.loss)
            else:
                state = _skip(t, state, step, agreed)
            last, stop = step.number == total, agreed.stop
            if t.validation is not None and selection.is_eval_step(step.number, total, recipe.eval_every_steps):
                due_state = state.model_copy(update={"eval_due": True})
                state = due_state if stop and not last else _evaluate(t, t.validation, due_state)
            if stop or state.stopped_early or agreed.due or undone:
                saver.save(state)
            if stop and not last:
                return t, state, True
    return t, state, False


def _learn(t: Training, step: Step, clock: _Clock) -> Micros:
    """Gradients of this rank's micro-batches. Where one has no memory, the rest is left out."""
    micros = step.micros[t.world.rank]
    sums, tally = [], t.loss_sum.tally()
    for index, micro in enumerate(micros):
        t.reporter.alive()
        last = index == len(micros) - 1
        try:
            batch = t.collate(t.train, micro)
            clock.lap("data")
            torch.manual_seed(seeds.mix(t.run.training.seed, "dropout", step.number, index, t.world.rank))
            with t.learner.accumulate(last), t.loss_sum.room(batch):
                loss = t.loss_sum(t.learner.model, batch, tally=tally)
                clock.lap("forward")
                # Ranks' gradients are averaged, but the loss is a mean over the tokens of all of them: so, the factor.
                t.learner.backward(loss * (t.world.size / step.label_tokens), last)
                clock.lap("backward")
        except Exception as error:
            why = failed_from(error)
            if why.reason != "OutOfMemory" or not t.learner.alone or len(micro) < 2:
                raise
            return Micros((), short=why.message, figures=(0.0,) * len(tally))
        sums.append(loss.detach())
    return Micros(tuple(float(value) for value in sums), figures=tuple(tally.tolist()))


def _with_smaller_micros(t: Training, state: State, why: str) -> tuple[Training, State]:
    """The step is done again from its start: the same global batch in more micro-batches, hence the same loss."""
    t.learner.forget()
    gc.collect()
    if t.world.device.type == "cuda":
        torch.cuda.empty_cache()
    state = state.model_copy(update={"halvings": state.halvings + 1})
    t = replace(t, plan=t.whole.halved(state.halvings))
    t.reporter.report(
        events.BackoffEvent, step=state.step + 1, halvings=state.halvings, choice=str(t.plan.shape), why=why
    )
    return t, state


def _refused(t: Training) -> float:
    """A loss that isn't finite never reaches the optimizer."""
    t.learner.forget()
    return math.nan


def _skip(t: Training, state: State, step: Step, agreed: Agreed) -> State:
    """The step counts as done and has changed nothing. Raises Failed where there were too many of its kind."""
    rows = agreed.bad_rows or tuple(sorted({t.train.line(example) for example in step.examples}))
    reason: guards.Reason = "NonFiniteGradient" if agreed.finite else "NonFiniteLoss"
    skipped = (*state.skipped, guards.Skipped(first=step.number, last=step.number, reason=reason, rows=rows))
    t.reporter.report(events.SkippedEvent, step=step.number, first=step.number, reason=reason, rows=rows)
    why = guards.too_many(skipped, t.run.training.max_skipped_steps)
    if why is not None:
        what = "the loss isn't finite" if reason == "NonFiniteLoss" else "a gradient isn't finite"
        raise Failed(
            "NonFiniteLoss",
            f"step {step.number}: {what}; the weights were left as they were. {why}. "
            f"dataset.uri rows {guards.listed(rows)} were computed there",
        )
    return state.model_copy(update={"skipped": skipped})


def _evaluate(t: Training, validation: Split, state: State) -> State:
    """The eval loss after state.step, and what follows from it; keeps the weights where they are the best so far."""
    recipe = t.run.training
    t.reporter.phase("evaluating")
    found = t.evaluator.measure(validation)
    loss = found.loss
    t.reporter.report(
        events.EvalEvent,
        step=state.step,
        split="validation",
        loss=loss,
        label_tokens=found.labels,
        rewards=found.rewards,
    )
    best = selection.after_eval(state.chosen, state.step, loss)
    if recipe.keep_best and best.step == state.step:
        t.best.keep()
    patience = recipe.early_stopping.patience if recipe.early_stopping else None
    stopped = selection.should_stop(best, patience) and state.step < t.plan.total_steps
    if stopped:
        t.reporter.decision(
            "earlyStopping",
            f"stop after step {state.step}",
            f"{patience} evaluations brought no loss below {best.loss:.6f}",
        )
    t.reporter.phase("training")
    return state.with_best(best).model_copy(update={"eval_due": False, "stopped_early": stopped})


def _report(t: Training, step: Step, agreed: Agreed, rate: float, norm: float, seconds: dict[str, float]) -> None:
    t.reporter.report(
        events.StepEvent,
        step=step.number,
        epoch=step.epoch,
        loss=agreed.loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=step.tokens,
        label_tokens=step.label_tokens,
        samples=len(step.examples),
        seconds=seconds,
        rewards=preference.rewards(agreed.figures, step.label_tokens),
    )


class _Clock:
    """Wall time of a step by part."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return {**self._parts, "total": time.perf_counter() - self._began}


def load_best(t: Training, state: State) -> None:
    """Puts the best weights back where earlier ones were better than the last."""
    if not t.run.training.keep_best or state.best is None or state.best.step == state.step:
        return
    t.best.put_back()
