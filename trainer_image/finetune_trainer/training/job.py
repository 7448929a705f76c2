"""What a rank does, from the model to the result, in order."""

from __future__ import annotations

from dataclasses import replace

from finetune_api.messages import events
from finetune_trainer import license as model_license
from finetune_trainer.checkpoint import local_folder
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.data.dataset import read
from finetune_trainer.errors import RunError
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.result import export, export_check
from finetune_trainer.parallel.sequence import groups
from finetune_trainer.reporting import model_card
from finetune_trainer.training import final_evaluation, loop, setup
from finetune_trainer.training.context import RankContext, Training


def run_job(context: RankContext) -> None:
    """Train and write the result, or resume doing so.

    Reports a SavedEvent at the end, or a PreemptedEvent after a request to stop. All ranks call it
    together. Raises RunError.
    """
    context = replace(context, world=groups.divide(context.world, context.run.world.sequence_parallel_size))
    paths, reporter = context.paths, context.reporter
    with reporter.beating():
        saved = _read_checkpoint(context)
        context = _of_same_date(context, saved)
        run = context.run
        reporter.phase("tokenizing")
        data = read(run, paths, context.world, reporter)
        setup.check_same_data(saved, data)
        reporter.phase("loading")
        prepared = setup.build(context, data, saved)
    loaded, data = prepared.loaded, prepared.data
    state = final_evaluation.evaluate_base(prepared.training, data, prepared.state)
    if state is None:
        reporter.report(events.PreemptedEvent, step=prepared.state.step)
        return
    result = loop.train(prepared.training, state)
    t, state = result.training, result.state
    if result.stopped:
        reporter.report(events.PreemptedEvent, step=state.step)
        return
    with reporter.beating():
        loop.load_best(t, state)
    test = final_evaluation.evaluate_result(t, data, state)
    if test is None:
        reporter.report(events.PreemptedEvent, step=state.step)
        return
    reporter.phase("saving")
    with reporter.beating():
        _save(t, state, loaded, test.loss)
    reporter.phase("done")


def _save(t: Training, state: CheckpointState, loaded: LoadedModel, test_loss: float | None) -> None:
    """Write the result on rank 0, and compare it with the trained model once it is loaded again.
    All ranks call it together."""
    run, paths, world = t.run, t.paths, t.world
    inputs = export_check.example(t.train, t.collate)
    probe = export_check.probe(inputs, t.evaluator.logits(inputs), t.loss_sum.autocast, run)
    if not world.is_first:
        export.send(loaded, t.strategy.gather, run=run, model=paths.model)
        return
    _write_result(t, state, loaded, test_loss)
    written = export_check.WrittenResult(paths.export, run, paths.model)
    export_check.check(written, probe, t.reporter, world.device)
    step = state.result_step(keep_best=run.training.keep_best)
    t.reporter.report(events.SavedEvent, path=str(paths.export), step=step)


def _write_result(t: Training, state: CheckpointState, loaded: LoadedModel, test_loss: float | None) -> None:
    """Write the adapter or model, and the merged model if there is one, each with its model
    card."""
    run, paths = t.run, t.paths
    best_loss = state.best.loss if state.best else None
    figures = model_card.Figures(state.step, t.plan.rows, best_loss, state.test_loss_before, test_loss)
    license = model_license.of_folder(paths.model)
    base_name = export.base_name(run)
    card = model_card.card(run, base_name, figures, license=license)
    export.write(paths.export, loaded, t.strategy.gather, run=run, model=paths.model, card=card)
    if run.merge:
        merged_card = model_card.card(run, base_name, figures, license=license, merged=True)
        export.write_merged(paths.export, paths.model, card=merged_card, heartbeat=t.reporter.heartbeat)


def _of_same_date(context: RankContext, saved: CheckpointState | None) -> RankContext:
    """Let the chat template write the date of the checkpoint, so that the rows stay the same.

    A run without a cluster is resumed on another day with another date in its configuration.
    """
    if saved is None or saved.date is None:
        return context
    data = context.run.data
    rendering = data.rendering.model_copy(update={"date": saved.date})
    return replace(
        context,
        run=context.run.model_copy(update={"data": data.model_copy(update={"rendering": rendering})}),
    )


def _read_checkpoint(context: RankContext) -> CheckpointState | None:
    """The state of the checkpoint on this node, or None. Raises RunError if nodes have different
    ones."""
    state = local_folder.read_state(context.paths.resume, verify=context.world.is_first_of_node)
    steps = context.world.all_gather(state.step if state else None, int | None)
    if len(set(steps)) > 1:
        raise RunError(
            "StorageUnavailable", f"the nodes downloaded different checkpoints to resume from (steps {steps})"
        )
    return state
