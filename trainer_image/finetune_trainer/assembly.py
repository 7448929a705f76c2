"""Model, learner and plan, put together for the loop. Called by `story` once, after the rows were read.

Every choice that depends on hardware, model or rows is made here, and told with its reason.
"""

from __future__ import annotations

import torch

from finetune_api import events
from finetune_api.resource import DpoSpec
from finetune_api.run import RunConfig
from finetune_trainer import (
    arrangement,
    compiling,
    dtype,
    fsdp,
    fused,
    method,
    model,
    optimizers,
    packing,
    plan,
    preference,
    resuming,
    settling,
    zero,
    zero_config,
)
from finetune_trainer.arrangement import Most
from finetune_trainer.batch import Collator
from finetune_trainer.checkpoint import State
from finetune_trainer.data import Data
from finetune_trainer.failure import Failed
from finetune_trainer.learner import Learner, Replicated, trained
from finetune_trainer.loss import LossSum
from finetune_trainer.paths import Paths
from finetune_trainer.reporter import Reporter
from finetune_trainer.train import Training
from finetune_trainer.world import World

_STAGES: dict[str, zero_config.Stage] = {"zero1": 1, "zero2": 2, "zero3": 3}


def check_same_data(saved: State | None, data: Data) -> None:
    if saved is not None and saved.data_key != data.key:
        raise Failed(
            "DatasetInvalid",
            "dataset.uri: the rows, or the model's tokenizer, changed since the checkpoint was taken, so the run "
            "can't go on from it; put the old file back, or start a new FineTuneJob",
        )


def build(
    run: RunConfig, paths: Paths, world: World, reporter: Reporter, data: Data, saved: State | None
) -> tuple[Training, model.Loaded, State, Data]:
    """Model, learner and plan, and the rows with all that the loss needs to know of them. Ends with the PlanEvent."""
    data = preference.examples(data, run.training.objective)
    choice, reason = _dtype(run, world, saved)
    reporter.decision("dtype", choice, reason)
    lora = run.lora if run.method == "lora" else None
    mixed = choice == "bfloat16"
    stored = torch.bfloat16 if mixed and lora is not None else torch.float32
    run, found = settling.settle(run, paths, world, reporter, longest=data.longest, half=mixed, saved=saved)
    with zero_config.split_while_loading(_STAGES.get(run.world.strategy), run.world.offload):
        outline = run.world.strategy == "fsdp" and not world.is_first
        longest = min(data.longest, run.data.max_sequence_length)  # of what one token sees: a pair is two answers
        quantized = method.quantized(run, world.device, reporter)
        loaded = model.load(paths.model, dtype=stored, longest=longest, outline=outline, quantized=quantized)
    loaded = method.apply(run, loaded, data, reporter)
    if found.way.recompute:
        model.recompute(loaded)
    parameters, trainable = loaded.parameters, loaded.trainable
    learner = _learner(run, loaded, world, reporter)
    sharding = resuming.sharding(run, learner, world, reporter, trainable)
    trial = packing.Trial(learner, data.train, reporter, _collator(loaded, data, world))
    loss_sum = packing.head(trial, LossSum.of(loaded.base, torch.bfloat16 if mixed else None, world.device.type))
    micro_tokens, reason = settling.micro_tokens(run, found, saved)
    halvings = max(saved.halvings if saved is not None else 0, world.firsts(_halvings(paths)))
    most = Most(micro_tokens, reason, halvings, data.longest)
    made = arrangement.arrange(run, trial, loss_sum, most, why_not=loaded.why_not)
    if run.training.objective == "dpo":
        data, loss_sum = _preferring(run, paths, trial, made, loss_sum, data, world)
    if saved is not None:  # only now: the reference is the model as it begins
        resuming.put_weights(learner, trained(loaded.model), paths)
    compiled = _compile(
        run, loaded, paths, world, reporter, made.whole, saved, half=mixed, recompute=found.way.recompute
    )
    _fuse(loaded, reporter, wanted=learner.alone and not compiled)
    t = Training(
        run,
        paths,
        world,
        reporter,
        made.plan,
        made.whole,
        data.train,
        data.validation,
        learner,
        made.collate,
        loss_sum,
        sharding,
    )
    state = saved or State(data_key=data.key, dtype=choice, micro_tokens=micro_tokens)
    way = {"strategy": found.way.strategy, "offload": found.way.offload, "compiled": compiled}
    state = state.model_copy(update={**way, "halvings": halvings})
    resuming.put_moments(t, saved)
    _tell_plan(t, data, state, parameters, trainable)
    return t, loaded, state, data


def _preferring(
    run: RunConfig,
    paths: Paths,
    trial: packing.Trial,
    made: arrangement.Arrangement,
    loss_sum: LossSum,
    data: Data,
    world: World,
) -> tuple[Data, preference.PreferenceSum]:
    """Pairs with what the base says of them, and the loss that needs it."""
    beta = run.training.dpo.beta if run.training.dpo else DpoSpec().beta
    lora = run.lora if run.method == "lora" else None
    aside = lora is not None and lora.init == "default" and lora.bias == "none"
    who = "the base without adapters" if aside else "the model before its first step"
    trial.reporter.decision("objective", "dpo", f"beta {beta:g}; {who} is the reference")
    trial.reporter.phase("evaluating")
    key = f"{preference.content(paths.model)} {loss_sum.autocast} {run.model.quantization} {run.added_tokens}"
    if lora is not None and not aside:
        key += f" {lora} {run.training.seed}"
    # Without its adapters the model takes its own output layer again, and not the copy that the head stands before.
    plain = loss_sum.plain if aside and lora and lora.modules_to_save else loss_sum
    reference = preference.Reference(
        trial.learner, made.whole.shape, made.collate, plain, world, trial.reporter.alive, aside
    )
    told = reference.beside(data, paths.token_cache, key)
    trial.reporter.phase("loading")
    return told, preference.PreferenceSum.over(loss_sum, beta)


def _halvings(paths: Paths) -> int:
    return int(paths.halvings.read_text()) if paths.halvings.is_file() else 0


def _dtype(run: RunConfig, world: World, saved: State | None) -> tuple[str, str]:
    if saved is not None and saved.dtype:
        return saved.dtype, "the checkpoint was computed in it"
    choice: tuple[str, str] = world.firsts(dtype.choose(run.model.dtype, world.device) if world.is_first else None)
    return choice


def _learner(run: RunConfig, loaded: model.Loaded, world: World, reporter: Reporter) -> Learner:
    recipe = optimizers.recipe(run.training, run.lora, world.device.type)
    why = optimizers.reason(run.training, recipe, run.world.strategy)
    reporter.decision("optimizer", recipe.optimizer, why)
    if run.world.strategy == "fsdp":
        return fsdp.Split(loaded.model, recipe, world, offload=run.world.offload == "parameters")
    stage = _STAGES.get(run.world.strategy)
    if stage is None:
        return Replicated(loaded.model, recipe, world)
    return zero.Sharded(loaded.model, recipe, world, stage, run.world.offload)


def _fuse(loaded: model.Loaded, reporter: Reporter, *, wanted: bool) -> None:
    norms, products = fused.put_in(loaded.base) if wanted else (0, 0)
    if norms or products:
        why = f"{norms} frozen norms and {products} gated products compute the same and keep less"
        reporter.decision("fused", "on", why)


def _tell_plan(t: Training, data: Data, state: State, parameters: int, trainable: int) -> None:
    t.reporter.report(
        events.PlanEvent,
        total_steps=t.plan.total_steps,
        start_step=state.step,
        epochs=t.plan.epochs,
        rows=t.plan.rows,
        dropped_rows=data.dropped,
        tokens_per_epoch=int(data.train.lengths.sum()),
        label_tokens_per_epoch=int(data.train.label_counts.sum()),
        padding_share=t.plan.padding_share(),
        computed_share=t.plan.computed_share(),
        parameters=parameters,
        trainable_parameters=trainable,
        halvings=state.halvings,
    )


def _compile(
    run: RunConfig,
    loaded: model.Loaded,
    paths: Paths,
    world: World,
    reporter: Reporter,
    whole: plan.Plan,
    saved: State | None,
    *,
    half: bool,
    recompute: bool,
) -> bool:
    """The layers, if it pays."""
    strategy, packed = run.world.strategy, whole.shape.packed
    facts = compiling.Run(world.device.type, half, strategy == "ddp", recompute, packed)

    def verdict() -> tuple[bool, str]:
        known = compiling.settled(run.training.compile, facts, saved.compiled if saved else None)
        if known is not None:
            return known
        tokens = whole.epochs * float(whole.lengths.sum()) * whole.computed_share() / world.size
        speed = dtype.gflops(torch.bfloat16 if half else torch.float32)
        lora = run.method == "lora"
        return compiling.pays(compiling.seconds(tokens, loaded.parameters, lora=lora, gflops=speed))

    choice, reason = world.firsts(verdict() if world.is_first else None)
    reporter.decision("compile", "on" if choice else "off", reason)
    if choice:
        compiling.compile_layers(model.layers(loaded.base), paths.compiled)
    return bool(choice)


def _collator(loaded: model.Loaded, data: Data, world: World) -> Collator:
    """Pads."""
    tokenizer = data.renderer.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(data.renderer.stops)
    start = getattr(loaded.base.config, "decoder_start_token_id", None)
    return Collator(False, False, loaded.encoder_decoder, pad, pad if start is None else start, world.device)
