"""Which kernels compute the model's layers: fused ones, compiled ones, or PyTorch's own.

On GPUs, fused kernels are used whether or not the layers are compiled. On CPUs, modules that store
less for the backward pass are used unless they are compiled.
"""

from __future__ import annotations

import torch

from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.errors import run_error_from
from finetune_trainer.kernels import fused_modules
from finetune_trainer.kernels.cuda import lora, modules, toolchain
from finetune_trainer.model import compilation, loading, precision
from finetune_trainer.model.loss import LossSum
from finetune_trainer.training.context import RankContext, Training
from finetune_trainer.training.load import WrappedModel
from finetune_trainer.training.packing_setup import MicroBatches, Trial
from finetune_trainer.training.resolve import ResolvedRun


def choose(
    context: RankContext, resolved: ResolvedRun, wrapped: WrappedModel, trial: Trial, batches: MicroBatches,
    loss_sum: LossSum, saved: CheckpointState | None,
) -> bool:  # fmt: skip
    """Replace and compile what is worth it. Returns whether layers are compiled. All ranks call it
    together."""
    world, reporter = context.world, context.reporter
    decision = _decision(context, resolved, wrapped, batches, saved) if world.is_first else (False, "")
    compiled, reason = world.broadcast(decision, tuple[bool, str])
    if world.device.type == "cuda":
        _fuse_on_gpu(context, wrapped)
    elif not compiled:
        _fuse(context, wrapped, "compute the same and keep less")
    if compiled:
        layers = loading.layers(wrapped.loaded.base)
        compilation.compile_layers(layers, context.paths.compiled)
        failures = [
            failure for failure in world.all_gather(_failure(context, trial, batches, loss_sum), str) if failure
        ]
        if failures:
            compilation.stop_compiling(layers)
            compiled, reason = (
                False,
                f"the first micro-batch can't be compiled, so layers run uncompiled: {failures[0]}",
            )
    reporter.decision("compile", "on" if compiled else "off", reason)
    return bool(compiled)


def report_programs(t: Training, state: CheckpointState, first: int) -> None:
    """Report how many programs were compiled, once, some steps after step `first`."""
    step = min(first + compilation.CHECKED_AT_STEP, t.plan.total_steps)
    if state.compiled and state.step == step:
        t.reporter.decision("compiledPrograms", *compilation.Programs.of_this_process().decision())


def _decision(
    context: RankContext, resolved: ResolvedRun, wrapped: WrappedModel, batches: MicroBatches,
    saved: CheckpointState | None,
) -> tuple[bool, str]:  # fmt: skip
    """Whether to compile, and why."""
    run, world, plan = context.run, context.world, batches.unhalved
    device = world.device.type
    conditions = compilation.Conditions(
        device, resolved.half, resolved.run.world.strategy, bool(resolved.recompute), plan.shape.packed
    )
    choice = compilation.choice(run.training.compile, conditions, saved.compiled if saved else None)
    if choice is not None:
        return choice
    tokens = plan.epochs * float(plan.lengths.sum()) * plan.computed_share() / world.size
    speed = compilation.assumed_gflops(device)
    speed = speed or precision.gflops(torch.bfloat16 if resolved.half else torch.float32)
    lora_only = run.method == "lora"
    seconds = compilation.training_seconds(tokens, wrapped.parameters, lora=lora_only, gflops=speed)
    return compilation.pays(seconds, device)


def _fuse_on_gpu(context: RankContext, wrapped: WrappedModel) -> None:
    missing = toolchain.missing()
    if missing:
        _fuse(context, wrapped, f"keep less, but aren't one kernel each: {missing}")
        return
    # ZeRO-3 gathers a module's weights only when the module itself is called.
    whole = context.run.world.strategy != "zero3"
    replaced = modules.replace_modules(wrapped.loaded.base, context.world.device, sums=whole)
    adapters = lora.replace_modules(wrapped.loaded.model) if whole else 0
    if replaced != modules.Replaced() or adapters:
        added = f"; {adapters} adapters add to their layer's result within a matrix product" if adapters else ""
        context.reporter.decision("fused", "on", f"{replaced} are one kernel each{added}")


def _fuse(context: RankContext, wrapped: WrappedModel, effect: str) -> None:
    """Replace modules by ones that keep less for the backward pass."""
    if not wrapped.strategy.independent_micro_batches:
        return
    norms, products = fused_modules.replace_modules(wrapped.loaded.base)
    if norms or products:
        context.reporter.decision("fused", "on", f"{norms} frozen norms and {products} gated products {effect}")


def _failure(context: RankContext, trial: Trial, batches: MicroBatches, loss_sum: LossSum) -> str:
    """Why this rank can't compute its first micro-batch with compiled layers, or "".

    Its gradients are discarded. A lack of memory is left to training.
    """
    strategy = trial.strategy
    micro_batches = batches.plan.step(1).micro_batches[context.world.data_rank]
    if not micro_batches:
        return ""
    batch = batches.collate(trial.train, micro_batches[0])
    torch.manual_seed(context.run.training.seed)
    strategy.model.train()
    try:
        with strategy.accumulate(True), loss_sum.packed_context(batch):
            loss = loss_sum(strategy.model, batch, metric_sums=loss_sum.metric_sums())
            strategy.backward(loss, True)
    except Exception as error:
        failure = run_error_from(error)
        return "" if failure.reason == "OutOfMemory" else failure.message[:300]
    finally:
        strategy.zero_grad()
    return ""
