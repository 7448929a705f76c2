"""Implements preference tuning with DPO (Rafailov et al. 2023): of two answers to a prompt, the
chosen one becomes more likely relative to the rejected one.

The loss of a pair is -log sigmoid(beta * ((log p_chosen - log ref_chosen) - (log p_rejected - log
ref_rejected))), with log p summed over the tokens of an answer. A pair is one example, whose prompt
is computed once. The reference is the model before training; its log-probabilities are computed
once, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune_api.messages.events import Rewards
from finetune_trainer.data.batching.collator import Batch
from finetune_trainer.kernels.attention import head_exchange
from finetune_trainer.model.loss import LossSum


@dataclass(frozen=True)
class PreferenceSum(LossSum):
    """Computes the sum of the losses of a batch's pairs. Its metrics are sums of the rewards."""

    beta: float = 0.1

    @classmethod
    def over(cls, inner: LossSum, beta: float) -> PreferenceSum:
        """Returns the preference loss whose log-probabilities are computed as `inner` computes
        them."""
        return cls(inner.selects_positions, inner.autocast, inner.device, inner.head, inner.context, beta)

    def metric_sums(self) -> Tensor:
        """Returns zeros, to which each call adds the sums that `rewards` divides."""
        return torch.zeros(len(Rewards.model_fields), dtype=torch.float64, device=self.device)

    def __call__(
        self, model: Callable[..., Any], batch: Batch, losses_out: Tensor | None = None,
        metric_sums: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns the loss as a float32 scalar, in which all pairs count equally. Call it inside
        `packed_context(batch)`.

        If ranks share a row, all of them have the gradient, but only the first one has the loss and
        the metrics, and the others zeros, so that sums over ranks count each pair once.

        `losses_out` is filled with -log p of each chosen answer, followed by zeros, so that
        perplexity is that of the chosen answers.
        """
        log_p = log_probabilities(self, model, batch)
        if batch.reference is None:  # an empty batch: this rank only joins the backward pass
            return log_p.sum() * 0.0
        gains = log_p - batch.reference.to(log_p.dtype)
        losses = loss_of(gains[:, 0], gains[:, 1], self.beta)
        counts = batch.sequence.rank == 0
        if losses_out is not None:
            losses_out.zero_()[: len(losses)] = -log_p[:, 0].detach() * counts
        if metric_sums is not None and counts:
            metric_sums += _reward_sums(log_p.detach(), self.beta * gains.detach())
        total = losses.sum()
        return total if counts else total - total.detach()


def loss_of(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Returns the loss of each pair. `chosen` and `rejected` are the amounts by which log p exceeds
    that of the reference."""
    return -functional.logsigmoid(beta * (chosen - rejected))


def rewards(sums: Sequence[float], pairs: int) -> Rewards | None:
    """Returns the mean rewards of `pairs` pairs, given their metric sums, or None if the objective
    has no metrics."""
    if not sums:
        return None
    means = (value / pairs for value in sums)
    return Rewards(**dict(zip(Rewards.model_fields, means, strict=True)))


def _reward_sums(log_p: Tensor, reward: Tensor) -> Tensor:
    """Returns sums over the pairs, in the order of the fields of Rewards. Both arguments are
    (pairs, 2)."""
    margins = reward[:, 0] - reward[:, 1]
    metrics = (*reward.unbind(1), margins, (margins > 0).to(reward.dtype), *log_p.unbind(1))
    return torch.stack([metric.sum(dtype=torch.float64) for metric in metrics])


def log_probabilities(loss_sum: LossSum, model: Callable[..., Any], batch: Batch) -> Tensor:
    """Returns log p of the chosen and of the rejected answer, summed over their tokens, (pairs, 2).

    If ranks share the row, all of them get the sums over the whole row, and call it together. An
    empty batch gives zeros, (1, 2).
    """
    losses = loss_sum.per_token(model, batch)
    if batch.answer is None:
        return losses.reshape(-1, 1).sum().reshape(1, 1).expand(1, 2)
    zeros = losses.new_zeros(batch.answers)
    # A part of a row without targets has one loss, a zero that takes part in the backward pass.
    answers = zeros.index_add(0, batch.answer, -losses) if batch.targets.numel() else zeros + losses.sum()
    return head_exchange.group_sum(batch.sequence, answers).view(-1, 2)
