"""How examples share a row and how many a rank computes at a time: the last step of the set-up.

Three shortcuts change nothing but speed: the head computes logits in chunks, examples are packed
end to end into one row, and a prefix that examples share is computed once. Each is compared with
the plain computation on two of the run's own examples and the very model that will train. A
shortcut whose loss differs isn't used, and the decision says so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from finetune_trainer.data import splits
from finetune_trainer.data.batching import batch_plan
from finetune_trainer.data.batching.batch_plan import BatchPlan, MicroBatch
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.splits import Split
from finetune_trainer.errors import RunError, insufficient_memory
from finetune_trainer.kernels import attention_avx512
from finetune_trainer.kernels.cuda import softmax
from finetune_trainer.model.check import rotary_positions
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.strategy import ParallelStrategy
from finetune_trainer.reporting.event_writer import EventWriter
from finetune_trainer.training import rounding_noise
from finetune_trainer.training.context import RankContext
from finetune_trainer.training.load import WrappedModel
from finetune_trainer.training.resolve import ResolvedRun

_MIN_SAVED_SHARE = 0.05  # of the tokens that shared prefixes must save
_EXCERPT_TOKENS = 4096  # of an example that is compared
_TOLERANCE = 1e-4  # of the loss
_MOST = 2e-2  # of the loss, however much rounding matters
_SPREAD = 4.0  # standard deviations of what rounding changes


@dataclass(frozen=True)
class Trial:
    """What the comparisons need; the same on every rank. `padded` collates without any shortcut.
    `layers` are those of the model, and `window` is its attention window if it matters."""

    strategy: ParallelStrategy
    train: Split
    reporter: EventWriter
    padded: Collator
    layers: tuple[torch.nn.Module, ...] = ()
    window: int = 0

    @cached_property
    def excerpts(self) -> Split:
        """The beginnings of long examples: rows that several ranks have to share, and all logits of
        long ones, don't fit on one rank."""
        return splits.excerpts(self.train, max(_EXCERPT_TOKENS, 2 * self.window))

    def loss(self, micro_batch: MicroBatch, collate: Collator, loss_sum: LossSum) -> float:
        """The summed loss of these examples in one batch, without dropout or gradients."""
        batch = collate(self.excerpts, micro_batch)
        self.strategy.model.eval()
        with loss_sum.packed_context(batch), torch.no_grad():
            loss = float(loss_sum(self.strategy.model, batch))
        self.strategy.model.train()
        return loss

    def one_by_one_loss(self, micro_batch: MicroBatch, loss_sum: LossSum) -> float:
        """The summed loss of these examples, each in a padded batch of its own."""
        return sum(self.loss((index,), self.padded, loss_sum) for index in micro_batch)

    def differ(self, loss: float, reference: float, micro_batch: MicroBatch, loss_sum: LossSum) -> bool:
        """Whether the losses of these examples differ by more than rounding; NaN differs.

        That is 1e-4 of the loss. In bfloat16 the kernels of one model may differ by more, which
        depends on the model, so that is measured.
        """
        difference, scale = abs(loss - reference), max(1.0, abs(reference))
        if loss_sum.autocast is None or difference <= _TOLERANCE * scale:
            return not difference <= _TOLERANCE * scale
        rounding = _SPREAD * rounding_noise.measure(self.layers, lambda: self._losses(micro_batch, loss_sum))
        return not difference <= min(rounding, _MOST * scale)

    def _losses(self, micro_batch: MicroBatch, loss_sum: LossSum) -> torch.Tensor:
        """The loss of each target of these examples, computed one by one."""
        losses = []
        self.strategy.model.eval()
        for index in micro_batch:
            batch = self.padded(self.excerpts, (index,))
            with loss_sum.packed_context(batch), torch.no_grad():
                losses.append(loss_sum.per_token(self.strategy.model, batch).flatten().double())
        self.strategy.model.train()
        return torch.cat(losses)


@dataclass(frozen=True)
class MicroBatches:
    """How examples are computed. `unhalved` is the plan before micro-batches were halved."""

    plan: BatchPlan
    unhalved: BatchPlan
    collate: Collator


def choose_head(trial: Trial, loss_sum: LossSum) -> LossSum:
    """Keep the chunked head if it computes the model's own loss."""
    report = trial.reporter.decision
    if loss_sum.head is None:
        report("head", "whole logits", "the output layer isn't a plain matrix")
        return loss_sum
    micro_batch = _shortest(trial.train)
    chunked = trial.one_by_one_loss(micro_batch, loss_sum)
    full = trial.one_by_one_loss(micro_batch, loss_sum.unchunked)
    figures = f"loss {chunked:.6f}, with whole logits {full:.6f}"
    if trial.differ(chunked, full, micro_batch, loss_sum):
        report("head", "whole logits", f"the model changes them after its output layer ({figures})")
        return loss_sum.unchunked
    fused = softmax.supports(trial.padded.device, loss_sum.autocast or torch.float32)
    kernel = ", with a fused softmax" if fused else ""
    report("head", "chunked", f"only the logits that the loss needs, a chunk at a time{kernel} ({figures})")
    return loss_sum


def plan_micro_batches(
    context: RankContext, resolved: ResolvedRun, wrapped: WrappedModel, trial: Trial, loss_sum: LossSum
) -> MicroBatches:
    """Decide on packing and shared prefixes, and plan all steps. All ranks call it together.

    Raises RunError(InsufficientMemory) if the last attempt ran out of memory, and micro-batches
    can't get smaller than they were.
    """
    run, train = context.run, trial.train
    apart = rotary_positions.company_obstacle(wrapped.loaded.base.config.get_text_config(), resolved.longest)
    packed = _packs(trial, loss_sum, wrapped.loaded, apart, enabled=run.data.packing)
    if packed and trial.padded.device.type == "cpu":
        trial.reporter.decision("attention", *attention_avx512.choice(loss_sum.autocast))
    size = 1 if apart else run.training.micro_batch_size
    tokens, longest = resolved.micro_batch_tokens, resolved.longest
    device_type = trial.padded.device.type
    part = context.world.sequence
    if part:
        _check_divided_rows(context, trial, loss_sum, wrapped.loaded, packed=packed)
    shape = batch_plan.shape(
        context.world.data_size,
        size,
        part.size * tokens,
        longest,
        packed=packed,
        device_type=device_type,
        parts=part.size,
    )
    options = batch_plan.PlanOptions(
        seed=run.training.seed,
        global_batch=run.training.global_batch_size,
        epochs=run.training.epochs,
        max_steps=run.training.max_steps,
        by_length=run.training.group_by_length,
    )
    unhalved = batch_plan.make(options, train.lengths, train.label_counts, shape, train.prefixes)
    dropout = run.lora.dropout if run.method == "lora" and run.lora else 0.0
    shared = _shares_prefixes(trial, loss_sum, unhalved, enabled=run.data.shared_prefix != "off", dropout=dropout)
    unhalved = replace(unhalved, shape=replace(shape, shared=shared))
    _report_order(unhalved, trial.reporter)
    if resolved.ran_out_of_memory and unhalved.halved(resolved.halvings - 1).is_smallest:
        raise insufficient_memory("an earlier attempt ran out of memory")
    plan = unhalved.halved(resolved.halvings)
    company = "; so are both answers of a pair, in the model and in the reference alike" if train.pairs else ""
    reason = f"{apart}{company}" if apart else resolved.micro_batch_reason
    if resolved.halvings:
        reason = f"halved {resolved.halvings} times, since an earlier attempt had no memory for more"
    trial.reporter.decision("microBatchSize", str(plan.shape), reason)
    return MicroBatches(plan, unhalved, replace(trial.padded, packed=packed, shared=shared, sequence=part))


def _packs(trial: Trial, loss_sum: LossSum, loaded: LoadedModel, apart: str, *, enabled: bool) -> bool:
    """Whether several examples share a row, unless `apart` says why they must not. Those that are
    compared exceed the model's window, if it has one that matters."""
    report, obstacle = trial.reporter.decision, loaded.packing_obstacle or apart
    if not enabled or obstacle:
        report("packing", "off", obstacle or "dataset.packing is false")
        return False
    differs, figures = _compare(trial, _shortest(trial.train, loaded.window), loss_sum, shared=False)
    if differs:
        report("packing", "off", f"in this model examples that share a row see each other ({figures})")
        return False
    windows = f", also beyond the attention window of {loaded.window} tokens" if loaded.window else ""
    report("packing", "on", f"examples that share a row don't see each other{windows} ({figures})")
    return True


def _check_divided_rows(
    context: RankContext, trial: Trial, loss_sum: LossSum, loaded: LoadedModel, *, packed: bool
) -> None:
    """Check that a row has the same loss if ranks share it. All ranks call it together.

    The row has little padding, so that an example crosses the border between two ranks. Raises
    RunError(InvalidConfig).
    """
    world, part = context.world, context.world.sequence
    field = f"distribution.sequenceParallelSize {part.size}"
    if not packed:
        raise RunError("InvalidConfig", f"{field}: only packed rows can be shared, and packing is off; set it to 1")
    micro_batch = _shortest(trial.train, loaded.window)
    divided = replace(trial.padded, packed=True, sequence=part, grain=1)
    (total,) = world.all_reduce_sum(trial.loss(micro_batch, divided, loss_sum))
    loss, one_by_one = total / world.data_size, trial.one_by_one_loss(micro_batch, loss_sum)
    figures = f"loss {loss:.6f} divided, {one_by_one:.6f} one by one"
    if trial.differ(loss, one_by_one, micro_batch, loss_sum):
        raise RunError(
            "InvalidConfig", f"{field}: in this model a divided row has another loss ({figures}); set it to 1"
        )
    reason = f"set by distribution.sequenceParallelSize; {world.data_size} groups of processes share rows ({figures})"
    trial.reporter.decision("sequenceParallel", str(part.size), reason)


def _shares_prefixes(trial: Trial, loss_sum: LossSum, plan: BatchPlan, *, enabled: bool, dropout: float) -> bool:
    """Whether a prefix that examples share is computed once, as it is in `plan`."""
    report = trial.reporter.decision
    if not enabled:
        report("sharedPrefix", "off", "set by dataset.sharedPrefix")
        return False
    if not plan.shape.packed:
        report("sharedPrefix", "off", "examples don't share rows")
        return False
    tokens, computed = plan.work()
    _, computed_separately = replace(plan, shape=replace(plan.shape, shared=False)).work()
    saved = 1 - computed / computed_separately
    figures = f"{computed} tokens computed for {tokens} in the examples"
    if saved < _MIN_SAVED_SHARE:
        report("sharedPrefix", "off", f"the examples have too little in common ({figures})")
        return False
    differs, losses = _compare(trial, _most_similar(plan, trial.train), loss_sum, shared=True)
    if differs:
        report("sharedPrefix", "off", f"in this model a shared prefix changes the loss ({losses})")
        return False
    once = "; adapter dropout is drawn once for a shared prefix" if dropout else ""
    report(
        "sharedPrefix", "on", f"prefixes that repeat are computed once: {figures}, {saved:.0%} less ({losses}){once}"
    )
    return True


def _compare(trial: Trial, micro_batch: MicroBatch, loss_sum: LossSum, *, shared: bool) -> tuple[bool, str]:
    """Whether the loss in a packed row differs from the one by one, and both losses."""
    collate = replace(trial.padded, packed=True, shared=shared)
    packed, one_by_one = trial.loss(micro_batch, collate, loss_sum), trial.one_by_one_loss(micro_batch, loss_sum)
    differs = trial.differ(packed, one_by_one, micro_batch, loss_sum)
    return differs, f"loss {packed:.6f} together, {one_by_one:.6f} one by one"


def _most_similar(plan: BatchPlan, split: Split) -> MicroBatch:
    """Of the pairs that the first steps compute together, the one with the longest shared
    prefix."""
    steps = (plan.step(number) for number in range(1, min(plan.total_steps, 20) + 1))
    micro_batches = (micro_batch for step in steps for rank in step.micro_batches for micro_batch in rank)
    pairs = [pair for micro_batch in micro_batches for pair in itertools.pairwise(micro_batch)]
    if not pairs:
        return _shortest(split)
    return max(pairs, key=lambda pair: split.prefixes.shared(pair, split.lengths)[1])


def _shortest(split: Split, window: int = 0) -> MicroBatch:
    """The two shortest examples; those of more than `window` tokens come first.

    If there is only one example, it is taken twice.
    """
    order = sorted(range(len(split)), key=lambda index: (split.lengths[index] <= window, split.lengths[index], index))
    shortest = order[:2]
    return tuple(shortest if len(shortest) == 2 else shortest * 2)


def _report_order(plan: BatchPlan, reporter: EventWriter) -> None:
    if not plan.by_length:
        return
    if plan.shape.packed:
        reason = "set by training.groupByLength, though packed rows have no padding to save"
        reporter.decision("order", "by length", reason)
        return
    random = replace(plan, by_length=False, _orders={})
    figures = (
        f"{plan.padding_share():.1%} of the computed tokens are padding, {random.padding_share():.1%} in random order"
    )
    reporter.decision("order", "by length", f"set by training.groupByLength; {figures}")
