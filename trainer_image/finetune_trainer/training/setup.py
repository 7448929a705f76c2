"""Everything that is decided and built before the first step, in three steps.

`resolve` decides what the loaded model isn't needed for, `load` loads the model and wraps it in
its parallel strategy, and `packing_setup` tries on that model how examples may share a row. Every
automatic choice is reported with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from finetune_api.messages import events
from finetune_trainer import refusals
from finetune_trainer.checkpoint import resume
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.data.dataset import Data, of_objective
from finetune_trainer.errors import RunError
from finetune_trainer.model import loading, precision, quantization
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.network import bandwidth
from finetune_trainer.parallel.strategy import trained
from finetune_trainer.training import dpo_reference, facts, layer_kernels, packing_setup
from finetune_trainer.training.context import RankContext, Training
from finetune_trainer.training.load import WrappedModel, half, load_and_wrap, stored
from finetune_trainer.training.resolve import ResolvedRun, resolve

_AS_PUBLISHED = "compare config.json with the one that was published"


@dataclass(frozen=True)
class PreparedRun:
    """What the loop starts from. `data` has everything that the loss needs to know of each row."""

    training: Training
    loaded: LoadedModel
    state: CheckpointState
    data: Data


def check_same_data(saved: CheckpointState | None, data: Data) -> None:
    """Raises RunError DatasetInvalid if the checkpoint was computed from other rows."""
    if saved is not None and saved.data_key != data.key:
        raise RunError(
            "DatasetInvalid",
            "dataset.uri: the rows, or the model's tokenizer, changed since the checkpoint was taken, so the run "
            "can't resume from it; restore the old file, or start a new FineTuneJob with output.existing: discard",
        )


def build(context: RankContext, data: Data, saved: CheckpointState | None) -> PreparedRun:
    """Prepare a run, which resumes from `saved` if there is one. All ranks call it together.

    Ends with a PlanEvent. Raises RunError for a run that can't be trained.
    """
    data = of_objective(data, context.run.training.objective)
    resolved = resolve(context.run, facts.gather(context, data, saved))
    for decision in resolved.decisions:
        context.reporter.decision(decision.topic, decision.choice, decision.reason)
    context = replace(context, run=resolved.run)
    _measure_network(context, resolved.replicas)
    run, paths, world, reporter = context.run, context.paths, context.world, context.reporter
    wrapped = load_and_wrap(context, resolved, data)
    strategy, loaded = wrapped.strategy, wrapped.loaded
    sharding = resume.sharding(run, strategy, world, reporter, wrapped.trainable)
    layers = tuple(loading.layers(loaded.base))
    trial = packing_setup.Trial(strategy, data.train, reporter, wrapped.collate, layers, loaded.window)
    loss_sum = _checked_loss(resolved, wrapped, trial)
    batches = packing_setup.plan_micro_batches(context, resolved, wrapped, trial, loss_sum)
    if run.training.objective == "dpo":
        data, loss_sum = dpo_reference.prepare(context, strategy, batches, loss_sum, data)
    if saved is not None:  # only now, because the reference is the model before its first step
        resume.put_weights(strategy, trained(loaded.model), paths)
    compiled = layer_kernels.choose(context, resolved, wrapped, trial, batches, loss_sum, saved)
    training = Training(
        context=context,
        plan=batches.plan,
        unhalved=batches.unhalved,
        train=data.train,
        validation=data.validation,
        strategy=strategy,
        collate=batches.collate,
        loss_sum=loss_sum,
        sharding=sharding,
    )
    state = _state(resolved, saved, data, compiled=compiled)
    resume.put_optimizer_state(strategy, training.best, saved, paths, keep_best=run.training.keep_best)
    _report_plan(training, data, state, wrapped, resolved)
    return PreparedRun(training, loaded, state, data)


def _checked_loss(resolved: ResolvedRun, wrapped: WrappedModel, trial: packing_setup.Trial) -> LossSum:
    """The loss, after the model's first forward passes have shown that it computes in the decided
    format.

    These passes choose the output layer. Raises RunError(TrainingError) for another format, and
    RunError(ModelInvalid) for a model that can't compute a row.
    """
    base, strategy = wrapped.loaded.base, wrapped.strategy
    loss_sum = LossSum.of(base, half(resolved), trial.padded.device.type)
    loss_sum = replace(loss_sum, context=strategy.autocast)
    computing = refusals.raising("ModelInvalid", "model.uri: the model can't compute a row", _AS_PUBLISHED)
    dimensions = quantization.refusing_wide_inputs(base, resolved.run.model.quantization)
    with computing, dimensions, precision.observing(base) as layers:
        loss_sum = packing_setup.choose_head(trial, loss_sum)
        if not layers.called:
            trial.one_by_one_loss((0,), loss_sum)
    precision.check(half(resolved) or torch.float32, stored(resolved), layers, resolved.run.world.strategy)
    return loss_sum


def _state(resolved: ResolvedRun, saved: CheckpointState | None, data: Data, *, compiled: bool) -> CheckpointState:
    """Where the run resumes, with what was decided since."""
    micro_tokens = resolved.micro_batch_tokens
    date = data.renderer.template.date
    state = saved or CheckpointState(data_key=data.key, date=date, dtype=resolved.dtype, micro_tokens=micro_tokens)
    world = resolved.run.world
    return state.model_copy(
        update={
            "strategy": world.strategy,
            "offload": world.offload,
            "mesh": (resolved.replicas, world.size // resolved.replicas) if world.strategy == "fsdp" else None,
            "compiled": compiled,
            "halvings": resolved.halvings,
        }
    )


def _measure_network(context: RankContext, replicas: int) -> None:
    """Measure and report the bandwidth between nodes, if there are several. With a copy of the
    model on each of them, weights aren't sent between nodes, so there is nothing to warn of."""
    run, world, reporter = context.run, context.world, context.reporter
    if run.world.nodes < 2:
        return
    measured = bandwidth.measure(world, context.paths.nccl_log(world.rank))
    reporter.decision("network", measured.choice, measured.reason)
    reporter.report(
        events.NetworkEvent,
        bytes_per_second=measured.bytes_per_second,
        backend=measured.backend,
        warning=measured.warning(run.world.strategy) if replicas == 1 else "",
    )


def _report_plan(
    training: Training, data: Data, state: CheckpointState, wrapped: WrappedModel, resolved: ResolvedRun
) -> None:
    plan = training.plan
    training.reporter.report(
        events.PlanEvent,
        total_steps=plan.total_steps,
        start_step=state.step,
        epochs=plan.epochs,
        rows=plan.rows,
        dropped_rows=data.dropped,
        tokens_per_epoch=int(data.train.lengths.sum()),
        label_tokens_per_epoch=int(data.train.label_counts.sum()),
        padding_share=plan.padding_share(),
        computed_share=plan.computed_share(),
        parameters=wrapped.parameters,
        trainable_parameters=wrapped.trainable,
        halvings=state.halvings,
        smallest_micro_batches=plan.is_smallest,
        flops_per_token=facts.flops_per_token(resolved, data.train, plan.computed_share()),
        peak_flops=facts.peak_flops(resolved, training.world.device),
    )
