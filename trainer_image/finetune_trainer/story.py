"""What a rank does from model to result, in order. Called by `rank` once the ranks have met."""

from __future__ import annotations

from finetune_api import events
from finetune_api.run import RunConfig
from finetune_trainer import (
    assembly,
    card,
    checkpoint,
    export,
    licence,
    measure,
    merge,
    reload,
    train,
)
from finetune_trainer.checkpoint import State
from finetune_trainer.data import read
from finetune_trainer.failure import Failed
from finetune_trainer.paths import Paths
from finetune_trainer.reporter import Reporter
from finetune_trainer.world import World


def tell(run: RunConfig, paths: Paths, world: World, reporter: Reporter) -> None:
    """Ends with a SavedEvent, or with a PreemptedEvent where a stop was asked for. Raises Failed."""
    saved = _resume(paths, world)
    reporter.phase("tokenizing")
    data = read(run, paths, world, reporter)
    assembly.check_same_data(saved, data)
    reporter.phase("loading")
    t, loaded, start, data = assembly.build(run, paths, world, reporter, data, saved)
    if run.merge:
        merge.check(paths.model, (name for name, p in loaded.model.named_parameters() if p.requires_grad))
    base = measure.base(t, data, start)
    if base is None:
        reporter.report(events.PreemptedEvent, step=start.step)
        return
    t, state, stopped = train.train(t, base)
    if stopped:
        reporter.report(events.PreemptedEvent, step=state.step)
        return
    train.load_best(t, state)
    found = measure.result(t, data, state)
    if found is None:
        reporter.report(events.PreemptedEvent, step=state.step)
        return
    reporter.phase("saving")
    seen = reload.probe(t)
    weights = t.learner.weights()
    if world.is_first:
        figures = card.Figures(
            state.step, t.plan.rows, state.best.loss if state.best else None, state.test_loss_before, found.loss
        )
        license = licence.of_folder(paths.model)
        text = card.card(run, export.base_name(run), figures, license=license)
        export.write(paths.export, loaded, weights, run=run, model=paths.model, card=text)
        if run.merge:
            whole = card.card(run, export.base_name(run), figures, license=license, merged=True)
            export.write_merged(paths.export, paths.model, card=whole, alive=reporter.alive)
        reload.check(paths.export, run, paths.model, seen, reporter, world.device)
        step = state.written(keep_best=run.training.keep_best)
        reporter.report(events.SavedEvent, path=str(paths.export), step=step)
    reporter.phase("done")


def _resume(paths: Paths, world: World) -> State | None:
    """The checkpoint on this node; all nodes must have fetched the same one."""
    state = checkpoint.read_state(paths.resume, verify=world.is_first_of_node)
    steps = world.everyones(state.step if state else None)
    if len(set(steps)) > 1:
        raise Failed("StorageUnavailable", f"the nodes fetched different checkpoints to resume from (steps {steps})")
    return state
