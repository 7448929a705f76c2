"""The loop, on one screen: what every rank does for every optimizer step. Called once, by `rank`.

Everything was decided before it starts. Which rows a step learns from is `plan`'s, how ranks work together `learner`'s.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api import events
from finetune_api.run import RunConfig
from finetune_trainer import checkpoint, schedule, seeds, selection
from finetune_trainer.batch import Collator
from finetune_trainer.checkpoint import State
from finetune_trainer.evaluate import Evaluator
from finetune_trainer.failure import Failed
from finetune_trainer.learner import Learner
from finetune_trainer.loss import LossSum
from finetune_trainer.paths import Paths
from finetune_trainer.plan import Plan, Step
from finetune_trainer.reporter import Reporter
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
    train: Split
    validation: Split | None
    learner: Learner
    collate: Collator
    loss_sum: LossSum

    @property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.learner, self.plan.shape, self.collate, self.loss_sum, self.world, self.reporter.alive)

    @property
    def best_path(self) -> Path:
        """Rank 0's copy of the weights with the lowest eval loss."""
        return self.paths.scratch / checkpoint.BEST


def train(t: Training, state: State) -> tuple[State, bool]:
    """(the state after the last step done, whether a stop was asked for before the end)"""
    total, recipe = t.plan.total_steps, t.run.training
    every = selection.checkpoint_interval(t.run.checkpoint.every, total)
    t.reporter.phase("training")
    t.learner.model.train()
    if t.validation is not None and state.eval_due:
        state = _evaluate(t, t.validation, state)
    while state.step < total and not state.stopped_early:
        clock = _Clock()
        step = t.plan.step(state.step + 1)
        nll = _learn(t, step, clock)
        loss, stop = _agree(t, step, nll)
        rate = schedule.learning_rate(step.number, total, recipe)
        norm = t.learner.step(rate)
        if not math.isfinite(norm):
            raise Failed("NonFiniteLoss", f"step {step.number}: a gradient isn't finite; its rows: {_lines(t, step)}")
        clock.lap("optimizer")
        state = state.model_copy(update={"step": step.number})
        _report(t, step, loss, rate, norm, clock.seconds())
        last = step.number == total
        if t.validation is not None and selection.is_eval_step(step.number, total, recipe.eval_every_steps):
            due = state.model_copy(update={"eval_due": True})
            state = due if stop and not last else _evaluate(t, t.validation, due)
        if stop or state.stopped_early or selection.is_checkpoint_step(step.number, total, every):
            _save(t, state)
        if stop and not last:
            return state, True
    return state, False


def _learn(t: Training, step: Step, clock: _Clock) -> list[float]:
    """Gradients of this rank's micro-batches; returns their summed losses."""
    micros = step.micros[t.world.rank]
    sums = []
    for index, micro in enumerate(micros):
        t.reporter.alive()
        batch = t.collate(t.train, micro)
        clock.lap("data")
        last = index == len(micros) - 1
        torch.manual_seed(seeds.mix(t.run.training.seed, "dropout", step.number, index, t.world.rank))
        with t.learner.accumulate(last), t.loss_sum.room(batch):
            loss = t.loss_sum(t.learner.model, batch)
            clock.lap("forward")
            # Ranks' gradients are averaged, but the loss is a mean over the tokens of all of them: hence the factor.
            t.learner.backward(loss * (t.world.size / step.label_tokens), last)
            clock.lap("backward")
        sums.append(loss.detach())
    return [float(value) for value in sums]


def _agree(t: Training, step: Step, nll: list[float]) -> tuple[float, bool]:
    """(the step's loss, whether any rank was asked to stop), the same on all ranks.

    Raises Failed on all of them where any loss isn't finite; the weights are still those before the step.
    """
    own = sum(nll)
    bad = not math.isfinite(own)
    total, any_bad, any_stop = t.world.total(0.0 if bad else own, float(bad), float(t.paths.stop.exists()))
    if any_bad:
        mine = [
            t.train.line(example)
            for micro, value in zip(step.micros[t.world.rank], nll, strict=True)
            if not math.isfinite(value)
            for example in micro
        ]
        rows = sorted({line for part in t.world.everyones(mine) for line in part})
        raise Failed(
            "NonFiniteLoss",
            f"step {step.number}: the loss isn't finite; the weights were left as they were. "
            f"dataset.uri rows {_listed(rows)} were computed there",
        )
    return total / step.label_tokens, any_stop > 0


def _evaluate(t: Training, validation: Split, state: State) -> State:
    """The eval loss after state.step, and what follows from it; keeps the weights where they are the best so far."""
    recipe = t.run.training
    t.reporter.phase("evaluating")
    loss, labels = t.evaluator.loss(validation)
    t.reporter.report(events.EvalEvent, step=state.step, split="validation", loss=loss, label_tokens=labels)
    best = selection.after_eval(state.chosen, state.step, loss)
    if recipe.keep_best and best.step == state.step:
        weights = t.learner.weights()
        if t.world.is_first:
            checkpoint.save_best(t.best_path, weights)
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


def _save(t: Training, state: State) -> None:
    """Gathers on all ranks, writes on rank 0."""
    began = time.monotonic()
    weights, moments = t.learner.weights(), t.learner.moments()
    if t.world.is_first:
        best = t.best_path if t.run.training.keep_best and state.best and state.best.step != state.step else None
        folder = checkpoint.save(t.paths.checkpoints, state, weights=weights, moments=moments, best=best, job=t.run.job)
        t.reporter.report(
            events.CheckpointEvent,
            step=state.step,
            path=str(folder),
            seconds=time.monotonic() - began,
            bytes=checkpoint.size(folder),
        )


def _report(t: Training, step: Step, loss: float, rate: float, norm: float, seconds: dict[str, float]) -> None:
    t.reporter.report(
        events.StepEvent,
        step=step.number,
        epoch=step.epoch,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=step.tokens,
        label_tokens=step.label_tokens,
        samples=len(step.examples),
        seconds=seconds,
    )


def _lines(t: Training, step: Step) -> str:
    return _listed(sorted({t.train.line(example) for example in step.examples}))


def _listed(lines: list[int]) -> str:
    more = f" and {len(lines) - 20} more" if len(lines) > 20 else ""
    return ", ".join(str(line) for line in lines[:20]) + more


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
    weights: dict[str, Any] = checkpoint.read_tensors(t.best_path) if t.world.is_first else {}
    t.learner.set_weights(weights)
