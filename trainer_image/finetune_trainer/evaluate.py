"""The mean loss of a split per learnt token, and answers to its prompts. Called by the loop on all ranks together.

The loss is one sum over the whole split divided by its learnt tokens, so it depends neither on ranks nor on batches.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer import plan
from finetune_trainer.batch import Collator
from finetune_trainer.learner import Learner
from finetune_trainer.loss import LossSum
from finetune_trainer.split import Split
from finetune_trainer.world import World

_TOGETHER = 4096  # examples that are spread over ranks at once


def split_loss(
    learner: Learner, split: Split, shape: plan.Shape, *, collate: Collator, loss_sum: LossSum, world: World
) -> tuple[float, int]:
    """(mean loss, learnt tokens)"""
    lengths, labels = split.lengths, int(split.label_counts.sum())
    learner.model.eval()
    own = torch.zeros((), dtype=torch.float64, device=world.device)
    with torch.no_grad():
        for begin in range(0, len(split), _TOGETHER):
            some = range(begin, min(begin + _TOGETHER, len(split)))
            for micro in plan.cut(some, lengths, shape)[world.rank]:
                batch = collate(split, micro)
                with loss_sum.room(batch):
                    own += loss_sum(learner.model, batch)
    learner.model.train()
    (total,) = world.total(float(own))
    return total / labels, labels


def answers(
    learner: Learner,
    prompts: list[list[int]],
    *,
    tokenizer: Any,
    stops: frozenset[int],
    max_new_tokens: int,
    autocast: torch.dtype | None,
    world: World,
    together: bool,
) -> tuple[str, ...]:
    """Greedy answers by prompt, on every rank. `together`: weights are split, so all ranks work on each prompt."""
    learner.model.eval()
    own: dict[int, str] = {}
    with torch.no_grad(), torch.autocast(world.device.type, autocast, enabled=autocast is not None):
        for index, prompt in enumerate(prompts):
            if not together and index % world.size != world.rank:
                continue
            ids = torch.tensor([prompt], device=world.device)
            out = learner.plain.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stops),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops),
                synced_gpus=together,
            )
            new = out[0] if learner.plain.config.is_encoder_decoder else out[0, len(prompt) :]
            own[index] = tokenizer.decode(new, skip_special_tokens=True).strip()
    learner.model.train()
    merged: dict[int, str] = {}
    for part in world.everyones(own):
        merged.update(part)
    return tuple(merged[index] for index in range(len(prompts)))


def packing_differs(
    learner: Learner, split: Split, *, collate: Collator, apart: Collator, loss_sum: LossSum
) -> tuple[bool, str]:
    """Whether two examples in one row give another loss than each alone, and the figures. Costs three forwards."""
    shortest = sorted(range(len(split)), key=lambda index: (int(split.lengths[index]), index))[:2]
    micro = tuple(shortest if len(shortest) == 2 else shortest * 2)
    learner.model.eval()
    with torch.no_grad():
        row = collate(split, micro)
        with loss_sum.room(row):
            packed = float(loss_sum(learner.model, row))
        alone = 0.0
        for index in micro:
            batch = apart(split, (index,))
            with loss_sum.room(batch):
                alone += float(loss_sum(learner.model, batch))
    learner.model.train()
    tolerance = 1e-4 if loss_sum.autocast is None else 2e-2
    return abs(packed - alone) > tolerance * max(1.0, abs(alone)), f"loss {packed:.6f} together, {alone:.6f} one by one"
