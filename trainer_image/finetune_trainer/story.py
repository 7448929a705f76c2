"""What a rank does from model to result, in order. Called by `rank` once the ranks have met."""

from __future__ import annotations

import torch

from finetune_api import events
from finetune_api.run import RunConfig
from finetune_trainer import (
    assembly,
    card,
    checkpoint,
    export,
    merge,
    reload,
    train,
)
from finetune_trainer.checkpoint import State
from finetune_trainer.data import Data, read
from finetune_trainer.evaluate import Speech
from finetune_trainer.failure import Failed
from finetune_trainer.paths import Paths
from finetune_trainer.reporter import Reporter
from finetune_trainer.split import Split
from finetune_trainer.train import Training
from finetune_trainer.world import World

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tell(run: RunConfig, paths: Paths, world: World, reporter: Reporter) -> None:
    """Ends with a SavedEvent, or with a PreemptedEvent where a stop was asked for. Raises Failed."""
    saved = _resume(paths, world)
    reporter.phase("tokenizing")
    data = read(run, paths, world, reporter)
    assembly.check_same_data(saved, data)
    reporter.phase("loading")
    t, loaded, start = assembly.build(run, paths, world, reporter, data, saved)
    start = _measure_base(t, data, start)
    if run.merge:
        merge.check(paths.model, (name for name, p in loaded.model.named_parameters() if p.requires_grad))
    t, state, stopped = train.train(t, start)
    if stopped:
        reporter.report(events.PreemptedEvent, step=state.step)
        return
    train.load_best(t, state)
    after = _measure_result(t, data, state)
    reporter.phase("saving")
    seen = reload.probe(t)
    weights = t.learner.weights()
    if world.is_first:
        figures = card.Figures(
            state.step, t.plan.rows, state.best.loss if state.best else None, state.test_loss_before, after
        )
        text = card.card(run, export.base_name(run), figures)
        export.write(paths.export, loaded, weights, run=run, model=paths.model, card=text)
        if run.merge:
            whole = card.card(run, export.base_name(run), figures, merged=True)
            export.write_merged(paths.export, paths.model, card=whole, alive=reporter.alive)
        reload.check(paths.export, run, paths.model, seen, reporter, world.device)
        chosen = state.best.step if run.training.keep_best and state.best else state.step
        reporter.report(events.SavedEvent, path=str(paths.export), step=chosen)
    reporter.phase("done")


def _resume(paths: Paths, world: World) -> State | None:
    """The checkpoint on this node; all nodes must have fetched the same one."""
    state = checkpoint.read_state(paths.resume)
    steps = world.everyones(state.step if state else None)
    if len(set(steps)) > 1:
        raise Failed("StorageUnavailable", f"the nodes fetched different checkpoints to resume from (steps {steps})")
    return state


def _measure_base(t: Training, data: Data, state: State) -> State:
    """The test loss and the answers before the first step; a resumed run has them in its checkpoint."""
    if state.step > 0 or data.test is None or state.test_loss_before is not None:
        return state
    loss = _test_loss(t, data.test, 0)
    return state.model_copy(update={"test_loss_before": loss, "answers_before": _answers(t, data)})


def _measure_result(t: Training, data: Data, state: State) -> float | None:
    if data.test is None:
        return None
    chosen = state.best.step if t.run.training.keep_best and state.best else state.step
    loss = _test_loss(t, data.test, chosen)
    for index, (row, after) in enumerate(zip(data.samples, _answers(t, data), strict=True)):
        t.reporter.report(
            events.SampleEvent,
            index=index,
            prompt="\n".join(turn.content for turn in row.turns[:-1]),
            reference=row.turns[-1].content,
            before=state.answers_before[index],
            after=after,
        )
    return loss


def _test_loss(t: Training, test: Split, step: int) -> float:
    t.reporter.phase("evaluating")
    loss, labels = t.evaluator.loss(test)
    t.reporter.report(events.EvalEvent, step=step, split="test", loss=loss, label_tokens=labels)
    return loss


def _answers(t: Training, data: Data) -> tuple[str, ...]:
    renderer = data.renderer
    speech = Speech(renderer.tokenizer, renderer.stops, t.run.evaluation.max_new_tokens, t.run.world.splits_weights)
    return t.evaluator.answers([renderer.prompt(row) for row in data.samples], speech)
