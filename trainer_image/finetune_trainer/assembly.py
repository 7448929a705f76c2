"""Model, learner and plan, put together for the loop. Called by `story` once, after the rows were read.

Every choice that depends on hardware, model or rows is made here, and told with its reason.
"""

from __future__ import annotations

import torch

from finetune_api import events
from finetune_api.run import RunConfig
from finetune_trainer import checkpoint, dtype, evaluate, footprint, model, plan, seeds, zero
from finetune_trainer.batch import Collator
from finetune_trainer.checkpoint import State
from finetune_trainer.data import Data
from finetune_trainer.failure import Failed
from finetune_trainer.learner import Learner, Recipe, Replicated
from finetune_trainer.loss import LossSum
from finetune_trainer.paths import Paths
from finetune_trainer.reporter import Reporter
from finetune_trainer.train import Training
from finetune_trainer.world import World

_STAGES: dict[str, zero.Stage] = {"zero1": 1, "zero2": 2, "zero3": 3}


def check_same_data(saved: State | None, data: Data) -> None:
    if saved is not None and saved.data_key != data.key:
        raise Failed(
            "DatasetInvalid",
            "dataset.uri: the rows, or the model's tokenizer, changed since the checkpoint was taken, so the run "
            "can't go on from it; put the old file back, or start a new FineTuneJob",
        )


def build(
    run: RunConfig, paths: Paths, world: World, reporter: Reporter, data: Data, saved: State | None
) -> tuple[Training, model.Loaded, State]:
    """Model, learner and plan. Ends with the PlanEvent."""
    choice, reason = _dtype(run, world, saved)
    reporter.decision("dtype", choice, reason)
    lora = run.lora if run.method == "lora" else None
    mixed = choice == "bfloat16"
    stored = torch.bfloat16 if mixed and lora is not None else torch.float32
    with zero.split_while_loading(_STAGES.get(run.world.strategy)):
        loaded = model.load(paths.model, dtype=stored, longest=data.longest)
    loaded = model.unfreeze(loaded) if lora is None else model.adapt(loaded, lora, seeds.mix(run.training.seed, "lora"))
    parameters, trainable = loaded.parameters, loaded.trainable
    if saved is not None:
        _put_weights(loaded, paths)
    learner = _learner(run, loaded, world)
    loss_sum = LossSum.of(loaded.base, torch.bfloat16 if mixed else None, world.device.type)
    padded = _collator(loaded, data, world, packed=False)
    packed = _packs(run, loaded, learner, data, padded, loss_sum, reporter)
    collate = _collator(loaded, data, world, packed=True) if packed else padded
    shape = _shape(run, loaded, world, data, loss_sum, packed, reporter)
    whole = plan.make(
        seed=run.training.seed,
        lengths=data.train.lengths,
        label_counts=data.train.label_counts,
        global_batch=run.training.global_batch_size,
        epochs=run.training.epochs,
        max_steps=run.training.max_steps,
        shape=shape,
    )
    t = Training(run, paths, world, reporter, whole, data.train, data.validation, learner, collate, loss_sum)
    state = saved or State(data_key=data.key, dtype=choice)
    if saved is not None:
        _put_moments(t, saved)
    reporter.report(
        events.PlanEvent,
        total_steps=whole.total_steps,
        start_step=state.step,
        epochs=whole.epochs,
        rows=whole.rows,
        dropped_rows=data.dropped,
        tokens_per_epoch=int(data.train.lengths.sum()),
        label_tokens_per_epoch=int(data.train.label_counts.sum()),
        padding_share=whole.padding_share(),
        parameters=parameters,
        trainable_parameters=trainable,
    )
    return t, loaded, state


def _dtype(run: RunConfig, world: World, saved: State | None) -> tuple[str, str]:
    if saved is not None and saved.dtype:
        return saved.dtype, "the checkpoint was computed in it"
    choice: tuple[str, str] = world.firsts(dtype.choose(run.model.dtype, world.device) if world.is_first else None)
    return choice


def _learner(run: RunConfig, loaded: model.Loaded, world: World) -> Learner:
    recipe = Recipe(run.training.weight_decay, run.training.max_grad_norm)
    stage = _STAGES.get(run.world.strategy)
    if stage is None:
        return Replicated(loaded.model, recipe, world)
    return zero.Sharded(loaded.model, recipe, world, stage)


def _put_weights(loaded: model.Loaded, paths: Paths) -> None:
    """Before the learner spreads them over the ranks."""
    own = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    weights = checkpoint.read_tensors(paths.resume / checkpoint.WEIGHTS, own)
    with torch.no_grad():
        for name, parameter in own.items():
            with zero.whole(parameter):
                parameter.copy_(weights[name])


def _put_moments(t: Training, saved: State) -> None:
    t.learner.set_moments(checkpoint.read_tensors(t.paths.resume / checkpoint.OPTIMIZER), saved.step)
    if t.world.is_first and saved.best is not None and t.run.training.keep_best:
        earlier = t.paths.resume / checkpoint.BEST
        source = earlier if earlier.is_file() else t.paths.resume / checkpoint.WEIGHTS
        checkpoint.save_best(t.best_path, checkpoint.read_tensors(source))


def _collator(loaded: model.Loaded, data: Data, world: World, *, packed: bool) -> Collator:
    tokenizer = data.renderer.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(data.renderer.stops)
    start = getattr(loaded.base.config, "decoder_start_token_id", None)
    return Collator(packed, loaded.encoder_decoder, pad, pad if start is None else start, world.device)


def _packs(
    run: RunConfig,
    loaded: model.Loaded,
    learner: Learner,
    data: Data,
    padded: Collator,
    loss_sum: LossSum,
    reporter: Reporter,
) -> bool:
    """Whether several examples share a row. Proven at each start, on this very model, before it is relied on."""
    if not run.data.packing:
        reporter.decision("packing", "off", "dataset.packing is false")
        return False
    if not loaded.packs:
        reporter.decision("packing", "off", loaded.why_not)
        return False
    together = Collator(True, False, padded.pad, padded.start, padded.device)
    differs, figures = evaluate.packing_differs(learner, data.train, collate=together, apart=padded, loss_sum=loss_sum)
    if differs:
        reporter.decision("packing", "off", f"in this model examples that share a row see each other ({figures})")
        return False
    reporter.decision("packing", "on", f"examples that share a row don't see each other ({figures})")
    return True


def _shape(
    run: RunConfig,
    loaded: model.Loaded,
    world: World,
    data: Data,
    loss_sum: LossSum,
    packed: bool,
    reporter: Reporter,
) -> plan.Shape:
    longest = int(data.train.lengths.max())
    row = run.data.max_sequence_length if packed else longest
    asked = run.training.micro_batch_size
    if isinstance(asked, int):
        rows_at_once, reason = asked, "training.microBatchSize says so"
    else:
        size = footprint.from_config(loaded.base.config, 4 if loss_sum.autocast is None else 2)
        share = -(-run.training.global_batch_size // world.size)
        rows_at_once, reason = footprint.rows_at_once(
            size, row_tokens=row, global_rows=share, device=world.device.type, free_bytes=_free_bytes(world)
        )
        rows_at_once, reason = world.firsts((rows_at_once, reason))
    what = f"{rows_at_once} rows of {row} tokens" if packed else f"{rows_at_once} examples"
    reporter.decision("microBatchSize", what, reason)
    return plan.Shape(world.size, rows_at_once, row, packed)


def _free_bytes(world: World) -> int:
    """Of the GPU, or this rank's share of the machine's free memory (the container's limit where it is lower)."""
    if world.device.type == "cuda":
        return int(torch.cuda.mem_get_info(world.device)[0])
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        free = min(free, int(text)) if text.isdigit() else free
    return free // world.local_size
