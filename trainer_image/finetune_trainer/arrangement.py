"""Arrangement: the plan of a run and how its examples come together in micro-batches, settled before the first step.

Called by `assembly` once the learner stands, on all ranks together: what may share a row is tried on the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_api.run import RunConfig
from finetune_trainer import attention_native, packing, plan
from finetune_trainer.batch import Collator
from finetune_trainer.loss import LossSum
from finetune_trainer.packing import Trial
from finetune_trainer.plan import Plan
from finetune_trainer.reporter import Reporter


@dataclass(frozen=True)
class Most:
    """What a rank may compute at once: so many `tokens`, and why, halved so often by earlier attempts. `longest` is the
    longest row's tokens."""

    tokens: int
    reason: str
    halvings: int
    longest: int


@dataclass(frozen=True)
class Arrangement:
    """`whole` is the plan before its micro-batches were halved."""

    plan: Plan
    whole: Plan
    collate: Collator


def arrange(run: RunConfig, trial: Trial, loss_sum: LossSum, most: Most, *, why_not: str) -> Arrangement:
    """Tells each choice. `why_not`: why the model's examples can't share a row, or nothing."""
    packed = packing.packs(trial, loss_sum, wanted=run.data.packing, why_not=why_not)
    if packed and trial.padded.device.type == "cpu":
        trial.reporter.decision("attention", *attention_native.choice(loss_sum.autocast))
    micro = run.training.micro_batch_size
    shape = plan.shape(run.world.size, micro, most.tokens, packed, most.longest, shared=packed)
    whole = plan.make(
        seed=run.training.seed,
        lengths=trial.train.lengths,
        label_counts=trial.train.label_counts,
        global_batch=run.training.global_batch_size,
        epochs=run.training.epochs,
        max_steps=run.training.max_steps,
        shape=shape,
        prefixes=trial.train.prefixes,
        by_length=run.training.group_by_length,
    )
    dropout = run.lora.dropout if run.method == "lora" and run.lora else 0.0
    shared = packing.shares(trial, loss_sum, whole, run.data, dropout)
    whole = replace(whole, shape=replace(shape, shared=shared))
    _tell_order(whole, trial.reporter)
    cut = whole.halved(most.halvings)
    reason = most.reason
    if most.halvings:
        reason = f"halved {most.halvings} times, since an earlier attempt had no memory for more"
    trial.reporter.decision("microBatchSize", str(cut.shape), reason)
    return Arrangement(cut, whole, replace(trial.padded, packed=packed, shared=shared))


def _tell_order(whole: Plan, reporter: Reporter) -> None:
    if not whole.by_length:
        return
    if whole.shape.packed:
        reporter.decision("order", "by length", "training.groupByLength says so; packed rows had no padding anyway")
        return
    random = replace(whole, by_length=False, _orders={})
    figures = (
        f"{whole.padding_share():.1%} of what is computed is padding, {random.padding_share():.1%} in random order"
    )
    reporter.decision("order", "by length", f"training.groupByLength says so; {figures}")
