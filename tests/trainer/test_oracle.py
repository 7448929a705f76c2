"""Against a trainer that isn't ours: Transformers' stock Trainer with the same model, adapters, rows and recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from finetune_api import events
from finetune_trainer import model, seeds
from trainer import naive
from trainer.ranks import finish_all, pairs, prepare

_STEPS = 20


class _Recording(Trainer):  # type: ignore[misc]
    """Takes the rows in the order in which they come, and keeps each step's loss unrounded."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return None

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        loss = super().training_step(*arguments, **options)
        self.seen.append(float(loss))
        return loss


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": padded("attention_mask", 0),
    }


@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_and_weights_equal_the_stock_trainers(
    accumulation: int, models: dict[str, Path], tmp_path: Path
) -> None:
    training = {
        "max_steps": _STEPS, "scheduler": "linear", "learning_rate": 5e-3, "weight_decay": 0.01, "max_grad_norm": 0.5,
        "micro_batch_size": 8 // accumulation,
    }  # fmt: skip
    job = prepare(tmp_path / "job", models["llama"], pairs(80), training=training)
    run = job.run
    assert run.lora is not None
    rows = naive.examples(job, tmp_path / "tokens")
    order = naive.schedule_of(job, rows)
    listed = []
    for number in range(1, _STEPS + 1):
        for index in order.step(number).examples:
            ids, learnt = rows.example(index)
            labels = [int(t) if flag else -100 for t, flag in zip(ids, learnt, strict=True)]
            listed.append({"input_ids": ids.tolist(), "labels": labels, "attention_mask": [1] * len(labels)})
    loaded = model.load(models["llama"], dtype=torch.float32, longest=96)
    loaded = model.adapt(loaded, run.lora, seeds.mix(run.training.seed, "lora"))
    theirs = _Recording(
        model=loaded.model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "theirs"), max_steps=_STEPS, per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation, learning_rate=5e-3, weight_decay=0.01, max_grad_norm=0.5,
            lr_scheduler_type="linear", warmup_steps=0, use_cpu=True, seed=1, report_to="none", save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True,
        ),
        train_dataset=listed,
        data_collator=_collate,
    )  # fmt: skip
    theirs.seen = []
    theirs.train()
    (ours,) = finish_all([job])
    steps = [sum(theirs.seen[i : i + accumulation]) for i in range(0, len(theirs.seen), accumulation)]
    assert ours.losses == pytest.approx(steps, rel=1e-6)
    assert ours.events(events.StepEvent)[-1].learning_rate == pytest.approx(5e-3 / _STEPS)
    written = naive.load_weights(ours)
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.detach() - written[name]).abs().max() < 1e-5, name
