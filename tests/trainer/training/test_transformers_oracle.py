"""The trainer is compared with one that isn't ours: the stock Trainer of Transformers, with the
same model, adapters, rows and recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from finetune_api.messages import events
from finetune_trainer import seeds
from finetune_trainer.data import dataset
from finetune_trainer.model import loading, lora
from finetune_trainer.parallel.world import World
from finetune_trainer.reporting.event_writer import EventWriter
from finetune_trainer.training import loop, setup
from finetune_trainer.training.context import RankContext
from testkit.rows import pairs
from trainer.support import reference_implementation
from trainer.support.rank_runs import FinishedRun, Job, finish_all, prepare

_STEPS = 20


class _Recording(Trainer):  # type: ignore[misc]
    """A Trainer that uses the rows in their given order and stores each step's unrounded loss."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return None

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        loss = super().training_step(*arguments, **options)
        self.step_losses.append(float(loss))
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


@dataclass(frozen=True)
class Theirs:
    """The mean loss of each step, and the trained weights by the model's parameter names."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


def _job(folder: Path, base: Path, accumulation: int) -> Job:
    training = {
        "max_steps": _STEPS, "scheduler": "linear", "learning_rate": 5e-3, "weight_decay": 0.01, "max_grad_norm": 0.5,
        "micro_batch_size": 8 // accumulation,
    }  # fmt: skip
    return prepare(folder, base, pairs(80), training=training)


def _stock(job: Job, folder: Path, accumulation: int, dtype: torch.dtype) -> Theirs:
    """Run the same job with the stock Trainer. In float64 it gets a separate loss function, since
    the one of Transformers is float32."""
    run = job.run
    assert run.lora is not None
    rows = reference_implementation.examples(job, folder / "tokens")
    order = reference_implementation.batch_plan_of(job, rows)
    listed = []
    for number in range(1, _STEPS + 1):
        for index in order.step(number).examples:
            ids, loss_mask = rows.example(index)
            labels = [int(t) if flag else -100 for t, flag in zip(ids, loss_mask, strict=True)]
            listed.append({"input_ids": ids.tolist(), "labels": labels, "attention_mask": [1] * len(labels)})
    loaded = loading.load(job.paths.model, dtype=torch.float32, longest=96)
    loaded = lora.adapt(loaded, run.lora, seeds.mix(run.training.seed, "lora"))
    trainer = _Recording(
        model=loaded.model.to(dtype),
        args=TrainingArguments(
            output_dir=str(folder / "theirs"), max_steps=_STEPS, per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation, learning_rate=5e-3, weight_decay=0.01, max_grad_norm=0.5,
            lr_scheduler_type="linear", warmup_steps=0, use_cpu=True, seed=1, report_to="none", save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True,
        ),
        train_dataset=listed,
        data_collator=_collate,
        compute_loss_func=_exact_loss if dtype == torch.float64 else None,
    )  # fmt: skip
    trainer.step_losses = []
    trainer.train()
    losses = [sum(trainer.step_losses[i : i + accumulation]) for i in range(0, len(trainer.step_losses), accumulation)]
    return Theirs(losses, {name: p.detach() for name, p in loaded.model.named_parameters() if p.requires_grad})


def _exact_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    logits = outputs.logits[:, :-1]
    assert logits.dtype == torch.float64
    total = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_and_weights_equal_the_stock_trainers(
    accumulation: int, models: dict[str, Path], tmp_path: Path
) -> None:
    """In float32 they agree to its rounding: consecutive float32 numbers near a loss of 5.6 differ
    by 5e-7."""
    job = _job(tmp_path / "job", models["llama"], accumulation)
    theirs = _stock(job, tmp_path, accumulation, torch.float32)
    (ours,) = finish_all([job])
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    assert ours.events(events.StepEvent)[-1].learning_rate == pytest.approx(5e-3 / _STEPS)
    written = reference_implementation.load_weights(ours)
    assert written.keys() == theirs.weights.keys()
    for name, parameter in theirs.weights.items():
        assert (parameter - written[name]).abs().max() < 1e-5, name


def _in_float64(job: Job) -> FinishedRun:
    """Run the trainer's own loop in this process, with its model and optimizer in float64, which
    jobs can't choose."""
    alone = World(0, 0, 1, 1, torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        reporter = EventWriter(job.paths.rank_events(0), 0)
        rows = dataset.read(job.run, job.paths, alone, reporter)
        prepared = setup.build(RankContext(job.run, job.paths, alone, reporter), rows, None)
        prepared.training.strategy.model.double()
        loop.train(prepared.training, prepared.state)
    finally:
        dist.destroy_process_group()
    return FinishedRun(job.paths, (0,), "")


def test_in_float64_every_loss_equals_the_stock_trainers_to_nine_digits(
    models: dict[str, Path], tmp_path: Path
) -> None:
    job = _job(tmp_path / "job", models["llama"], 4)
    theirs = _stock(job, tmp_path, 4, torch.float64)
    assert _in_float64(job).losses == pytest.approx(theirs.losses, abs=1e-9, rel=0)
