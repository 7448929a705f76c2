"""The training loop: what every rank does for every optimizer step.

Everything was decided before it starts. `BatchPlan` says which rows a step is trained on, and the
parallel strategy how ranks work together.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, replace

import torch

from finetune_api.messages import events
from finetune_trainer import seeds
from finetune_trainer.checkpoint.state import CheckpointState, Skipped
from finetune_trainer.data.batching.batch_plan import Step
from finetune_trainer.data.splits import Split
from finetune_trainer.errors import RunError, insufficient_memory, run_error_from
from finetune_trainer.model import dpo
from finetune_trainer.reporting.event_log import listed
from finetune_trainer.training import anomalies, early_stopping, layer_kernels, lr_schedule, rollback
from finetune_trainer.training.context import Training
from finetune_trainer.training.steps import step_clock
from finetune_trainer.training.steps.step_clock import StepClock
from finetune_trainer.training.steps.step_sync import OwnMicroBatches, StepOutcome, agree
from finetune_trainer.training.steps.stragglers import StragglerWatch


@dataclass(frozen=True)
class LoopResult:
    """How the loop ended.

    `training` computes smaller micro-batches than the loop began with if memory ran out. `state`
    is that after the last completed step. `stopped`: all ranks agreed to stop before the end.
    """

    training: Training
    state: CheckpointState
    stopped: bool


def train(t: Training, state: CheckpointState) -> LoopResult:
    """Train from `state` to the end of the plan, or until a stop. All ranks call it together."""
    total, recipe, first = t.plan.total_steps, t.run.training, state.step
    t.reporter.phase("training")
    t.strategy.model.train()
    if t.validation is not None and state.eval_due:
        state = _evaluate(t, t.validation, state)
    stragglers = StragglerWatch()
    clock = step_clock.of_device(t.world.device)
    with t.saver() as saver:
        while state.step < total and not state.stopped_early:
            clock.start()
            step = t.plan.step(state.step + 1)
            own = _accumulate_gradients(t, step, clock)
            stop_requested, due = t.paths.stop.exists(), saver.due(step.number, total)
            agreed = agree(t.world, step, t.train, own, stop=stop_requested, checkpoint_due=due)
            if agreed.out_of_memory:
                t, state = _halve_micro_batches(t, state, agreed.out_of_memory)
                continue
            rate = lr_schedule.learning_rate(step.number, total, recipe)
            norm = t.strategy.step(rate) if agreed.finite else _discard_gradients(t)
            clock.lap("optimizer")
            state, rolled_back = state.model_copy(update={"step": step.number}), False
            if math.isfinite(norm):
                _report(t, step, agreed, rate, norm, clock.seconds())
                _report_straggler(t, step, agreed, stragglers)
                layer_kernels.report_programs(t, state, first)
                state, rolled_back = rollback.roll_back_after_spike(t, saver, state, agreed.loss)
            else:
                state = _skip(t, state, step, agreed)
            last, stop = step.number == total, agreed.stop
            if t.validation is not None and early_stopping.is_eval_step(step.number, total, recipe.eval_every_steps):
                eval_due = state.model_copy(update={"eval_due": True})
                state = eval_due if stop and not last else _evaluate(t, t.validation, eval_due)
            if stop or state.stopped_early or agreed.checkpoint_due or rolled_back:
                saver.save(state)
            if stop and not last:
                return LoopResult(t, state, stopped=True)
    return LoopResult(t, state, stopped=False)


def load_best(t: Training, state: CheckpointState) -> None:
    """Put the best weights back into the model if earlier ones were better than the last."""
    if not t.run.training.keep_best or state.best is None or state.best.step == state.step:
        return
    t.best.restore()


def _accumulate_gradients(t: Training, step: Step, clock: StepClock) -> OwnMicroBatches:
    """Forward and backward of this rank's micro-batches. If one runs out of memory, the rest is
    left out."""
    begin, micro_batches = time.perf_counter(), step.micro_batches[t.world.data_rank]
    losses, metric_sums = [], t.loss_sum.metric_sums()
    for index, micro_batch in enumerate(micro_batches):
        t.reporter.heartbeat()
        last = index == len(micro_batches) - 1
        try:
            batch = t.collate(t.train, micro_batch)
            clock.lap("data")
            torch.manual_seed(seeds.mix(t.run.training.seed, "dropout", step.number, index, t.world.rank))
            with t.strategy.accumulate(last), t.loss_sum.packed_context(batch):
                loss = t.loss_sum(t.strategy.model, batch, metric_sums=metric_sums)
                clock.lap("forward")
                # Gradients are averaged over ranks, but the loss is a mean over the tokens of all
                # ranks: the factor makes up for it.
                t.strategy.backward(loss * (t.world.size / step.label_tokens), last)
                clock.lap("backward")
        except Exception as error:
            failure = run_error_from(error)
            independent = t.strategy.independent_micro_batches
            if isinstance(error, torch.OutOfMemoryError) and len(micro_batch) == 1:  # of a GPU, which no rank shares
                raise insufficient_memory(failure.message) from error
            if failure.reason != "OutOfMemory" or not independent or len(micro_batch) < 2:
                raise
            return OwnMicroBatches((), out_of_memory=failure.message, metric_sums=(0.0,) * len(metric_sums))
        losses.append(loss.detach())
    nll = tuple(float(loss) for loss in losses)  # waits until a GPU has computed them
    return OwnMicroBatches(nll, metric_sums=tuple(metric_sums.tolist()), seconds=time.perf_counter() - begin)


def _halve_micro_batches(t: Training, state: CheckpointState, message: str) -> tuple[Training, CheckpointState]:
    """Halve micro-batches after one of them ran out of memory (`message`).

    The step is then computed again from its start: the same global batch in more micro-batches,
    hence the same loss.
    """
    t.strategy.zero_grad()
    gc.collect()
    if t.world.device.type == "cuda":
        torch.cuda.empty_cache()
    state = state.model_copy(update={"halvings": state.halvings + 1})
    t = replace(t, plan=t.unhalved.halved(state.halvings))
    t.reporter.report(
        events.BackoffEvent, step=state.step + 1, halvings=state.halvings, choice=str(t.plan.shape), why=message
    )
    return t, state


def _discard_gradients(t: Training) -> float:
    """Keep a loss that isn't finite from the optimizer. Returns the norm of the gradients: NaN."""
    t.strategy.zero_grad()
    return math.nan


def _skip(t: Training, state: CheckpointState, step: Step, agreed: StepOutcome) -> CheckpointState:
    """Count a step as done that changed nothing. Raises RunError NonFiniteLoss if there were too
    many."""
    rows = agreed.bad_rows or tuple(sorted({t.train.line_number(example) for example in step.examples}))
    reason: events.SkipReason = "NonFiniteGradient" if agreed.finite else "NonFiniteLoss"
    skipped = (*state.skipped, Skipped(first=step.number, last=step.number, reason=reason, rows=rows))
    t.reporter.report(events.SkippedEvent, step=step.number, first=step.number, reason=reason, rows=rows)
    too_many = anomalies.too_many(skipped, t.run.training.max_skipped_steps)
    if too_many is not None:
        quantity = "the loss" if reason == "NonFiniteLoss" else "a gradient"
        raise RunError(
            "NonFiniteLoss",
            f"step {step.number}: {quantity} isn't finite; the weights were left as they were. {too_many}. "
            f"dataset.uri rows {listed(rows)} were computed there",
        )
    return state.model_copy(update={"skipped": skipped})


def _evaluate(t: Training, validation: Split, state: CheckpointState) -> CheckpointState:
    """Report the eval loss after the current step, keep the best weights, and decide on stopping
    early."""
    recipe = t.run.training
    t.reporter.phase("evaluating")
    result = t.evaluator.measure(validation)
    t.reporter.report(
        events.EvalEvent,
        step=state.step,
        split="validation",
        loss=result.loss,
        label_tokens=result.label_count,
        rewards=result.rewards,
    )
    best = early_stopping.after_eval(state.best_so_far, state.step, result.loss)
    if recipe.keep_best and best.step == state.step:
        t.best.keep()
    patience = recipe.early_stopping.patience if recipe.early_stopping else None
    stops = early_stopping.should_stop(best, patience) and state.step < t.plan.total_steps
    if stops:
        t.reporter.decision(
            "earlyStopping",
            f"stop after step {state.step}",
            f"{patience} evaluations brought no loss below {best.loss:.6f}",
        )
    t.reporter.phase("training")
    return state.with_best(best).model_copy(update={"eval_due": False, "stopped_early": stops})


def _report(t: Training, step: Step, agreed: StepOutcome, rate: float, norm: float, seconds: dict[str, float]) -> None:
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
        rewards=dpo.rewards(agreed.metric_sums, step.label_tokens),
        ranks=_rank_seconds(t, agreed),
    )


def _rank_seconds(t: Training, agreed: StepOutcome) -> events.RankSeconds | None:
    """Compare the ranks' own seconds. None if there is nothing to compare: if ranks wait for each
    other within their micro-batches, all of them need as long as the slowest."""
    times = agreed.rank_seconds
    if len(times) < 2 or not t.strategy.independent_micro_batches:
        return None
    return events.RankSeconds(fastest=min(times), slowest=max(times), slowest_rank=times.index(max(times)))


def _report_straggler(t: Training, step: Step, agreed: StepOutcome, watch: StragglerWatch) -> None:
    if _rank_seconds(t, agreed) is None:
        return
    lengths = t.train.lengths
    tokens = [sum(int(lengths[list(batch)].sum()) for batch in batches if batch) for batches in step.micro_batches]
    before = watch.current
    if not watch.add(agreed.rank_seconds, tokens):
        return
    for straggler, ended in ((before, True), (watch.current, False)):
        if straggler is not None:
            node = straggler.rank // t.world.local_size
            fields = {"rank": straggler.rank, "node": node, "ratio": straggler.ratio, "ended": ended}
            t.reporter.report(events.StragglerEvent, step=step.number, **fields)
