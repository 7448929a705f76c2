"""How examples share a row, decided before the first step and proven on the very model that will train.

Three shortcuts change nothing but speed: the head computes chunks of logits, examples lie end to end, and what they
begin with alike is computed once. Each is compared with the plain way on two of the run's examples; what differs isn't
used, and the decision says so. Called by `assembly` on all ranks together.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from finetune_api.run import DataConfig
from finetune_trainer import plan
from finetune_trainer.batch import Collator
from finetune_trainer.learner import Learner
from finetune_trainer.loss import LossSum
from finetune_trainer.plan import Micro
from finetune_trainer.reporter import Reporter
from finetune_trainer.split import Split

_WORTH = 0.05  # of the tokens, to be saved by sharing


@dataclass(frozen=True)
class Trial:
    """What the comparisons need; the same on every rank."""

    learner: Learner
    train: Split
    reporter: Reporter
    padded: Collator

    def loss(self, micro: Micro, collate: Collator, loss_sum: LossSum) -> float:
        batch = collate(self.train, micro)
        self.learner.model.eval()
        with loss_sum.room(batch), torch.no_grad():
            loss = float(loss_sum(self.learner.model, batch))
        self.learner.model.train()
        return loss

    def alone(self, micro: Micro, loss_sum: LossSum) -> float:
        return sum(self.loss((index,), self.padded, loss_sum) for index in micro)


def head(trial: Trial, loss_sum: LossSum) -> LossSum:
    """With the chunked head if it computes the model's own loss."""
    if loss_sum.head is None:
        trial.reporter.decision("head", "whole logits", "the output layer isn't a plain matrix")
        return loss_sum
    micro = _shortest(trial.train)
    chunked, whole = trial.alone(micro, loss_sum), trial.alone(micro, loss_sum.plain)
    figures = f"loss {chunked:.6f}, by whole logits {whole:.6f}"
    if _differ(chunked, whole, loss_sum):
        trial.reporter.decision("head", "whole logits", f"the model changes them after its output layer ({figures})")
        return loss_sum.plain
    trial.reporter.decision("head", "chunked", f"logits of learnt positions, some at a time ({figures})")
    return loss_sum


def packs(trial: Trial, loss_sum: LossSum, *, wanted: bool, why_not: str) -> bool:
    """Whether several examples share a row."""
    if not wanted or why_not:
        trial.reporter.decision("packing", "off", why_not or "dataset.packing is false")
        return False
    micro = _shortest(trial.train)
    differs, figures = _compare(trial, micro, loss_sum, shared=False)
    if differs:
        trial.reporter.decision("packing", "off", f"in this model examples that share a row see each other ({figures})")
        return False
    trial.reporter.decision("packing", "on", f"examples that share a row don't see each other ({figures})")
    return True


def shares(trial: Trial, loss_sum: LossSum, whole: plan.Plan, data: DataConfig, dropout: float) -> bool:
    """Whether what examples begin with alike is computed once. `whole` is the plan with it on."""
    say = trial.reporter.decision
    if data.shared_prefix == "off":
        say("sharedPrefix", "off", "dataset.sharedPrefix says so")
        return False
    if not whole.shape.packed:
        say("sharedPrefix", "off", "examples don't share rows")
        return False
    (seen, computed), apart = whole.work(), replace(whole, shape=replace(whole.shape, shared=False)).work()[1]
    saved = 1 - computed / apart
    figures = f"{computed} tokens computed for {seen} seen"
    if saved < _WORTH:
        say("sharedPrefix", "off", f"the examples have too little in common ({figures})")
        return False
    differs, losses = _compare(trial, _alike(whole, trial.train), loss_sum, shared=True)
    if differs:
        say("sharedPrefix", "off", f"in this model a shared beginning changes the loss ({losses})")
        return False
    once = "; adapter dropout is drawn once for a shared beginning" if dropout else ""
    say("sharedPrefix", "on", f"beginnings that repeat are computed once: {figures}, {saved:.0%} less ({losses}){once}")
    return True


def _compare(trial: Trial, micro: Micro, loss_sum: LossSum, *, shared: bool) -> tuple[bool, str]:
    collate = replace(trial.padded, packed=True, shared=shared)
    together, apart = trial.loss(micro, collate, loss_sum), trial.alone(micro, loss_sum)
    return _differ(together, apart, loss_sum), f"loss {together:.6f} together, {apart:.6f} one by one"


def _alike(whole: plan.Plan, split: Split) -> Micro:
    """Of the pairs that the first steps compute together, the one that shares most."""
    steps = (whole.step(number) for number in range(1, min(whole.total_steps, 20) + 1))
    micros = (micro for step in steps for rank in step.micros for micro in rank)
    pairs = [pair for micro in micros for pair in itertools.pairwise(micro)]
    if not pairs:
        return _shortest(split)
    return max(pairs, key=lambda pair: split.prefixes.shared(pair, split.lengths)[1])


def _shortest(split: Split) -> Micro:
    shortest = sorted(range(len(split)), key=lambda index: (int(split.lengths[index]), index))[:2]
    return tuple(shortest if len(shortest) == 2 else shortest * 2)


def _differ(one: float, other: float, loss_sum: LossSum) -> bool:
    tolerance = 1e-4 if loss_sum.autocast is None else 2e-2
    return not abs(one - other) <= tolerance * max(1.0, abs(other))
