"""The same training in its simplest form, for comparison: one example at a time, no batch, no
ranks, no masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from finetune_trainer import seeds
from finetune_trainer.data import token_cache
from finetune_trainer.data.batching import batch_plan
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.model import freezing, loading, lora
from finetune_trainer.parallel.strategy import trained
from finetune_trainer.training import lr_schedule
from trainer.support.rank_runs import FinishedRun, Job


@dataclass(frozen=True)
class ReferenceRun:
    """Mean loss per label token of each step, gradient norms before clipping, and the weights at
    the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def examples(job: Job, cache: Path) -> token_cache.Tokens:
    """Renders the job's training rows."""
    renderer = Renderer.load(job.paths.model, job.run.data.max_sequence_length)
    return token_cache.build(cache, "reference", job.paths.data("train"), ReadOptions("dataset.uri", renderer, "fail"))


def batch_plan_of(job: Job, rows: token_cache.Tokens) -> batch_plan.BatchPlan:
    """Returns the job's plan for one rank, without packing."""
    training = job.run.training
    options = batch_plan.PlanOptions(
        seed=training.seed,
        global_batch=training.global_batch_size,
        epochs=training.epochs,
        max_steps=training.max_steps,
        by_length=training.group_by_length,
    )
    shape = batch_plan.MicroBatchShape(world=1, rows=1, tokens=96, packed=False)
    return batch_plan.make(options, rows.lengths, rows.label_counts, shape)


def train(job: Job, cache: Path) -> ReferenceRun:
    """Trains to the job's last step."""
    run = job.run
    loaded = loading.load(job.paths.model, dtype=torch.float32, longest=run.data.max_sequence_length)
    seed = seeds.mix(run.training.seed, "lora")
    loaded = lora.adapt(loaded, run.lora, seed) if run.lora else freezing.unfreeze(loaded)
    parameters = trained(loaded.model)
    ratio = (run.lora.plus_ratio if run.lora else None) or 1.0
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "weight_decay": run.training.weight_decay if parameter.dim() > 1 else 0.0,
                "ratio": ratio if ".lora_B." in name else 1.0,
            }
            for name, parameter in parameters.items()
        ]
    )
    rows = examples(job, cache)
    plan = batch_plan_of(job, rows)
    losses, norms = [], []
    for number in range(1, plan.total_steps + 1):
        step = plan.step(number)
        nll = torch.stack([_nll(loaded, rows, index) for index in step.examples]).sum() / step.label_tokens
        nll.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), run.training.max_grad_norm)))
        rate = lr_schedule.learning_rate(number, plan.total_steps, run.training)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(nll.detach()))
    return ReferenceRun(losses, norms, {name: p.detach().clone() for name, p in parameters.items()})


def gradients(job: Job, cache: Path) -> tuple[float, dict[str, Tensor]]:
    """Returns the loss and the gradients, by name, of the first step of a job that trains every
    weight."""
    longest = job.run.data.max_sequence_length
    loaded = freezing.unfreeze(loading.load(job.paths.model, dtype=torch.float32, longest=longest))
    rows = examples(job, cache)
    step = batch_plan_of(job, rows).step(1)
    nll = torch.stack([_nll(loaded, rows, index) for index in step.examples]).sum() / step.label_tokens
    nll.backward()
    return float(nll.detach()), {name: p.grad.clone() for name, p in trained(loaded.model).items()}


def load_weights(run: FinishedRun) -> dict[str, Tensor]:
    """Returns the trained weights of a run's last checkpoint, by the model's names."""
    newest = max(run.paths.checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]))
    return dict(load_file(newest / "weights.safetensors"))


def _nll(loaded: loading.LoadedModel, rows: token_cache.Tokens, index: int) -> Tensor:
    """Returns the negative log-likelihood of an example's labels, summed."""
    ids, loss_mask = rows.example(index)
    source = int(rows.sources[index])
    tokens = torch.tensor(ids.astype("int64"))
    if source:
        labels = tokens[source:]
        logits = loaded.model(input_ids=tokens[None, :source], labels=labels[None], use_cache=False).logits[0]
        return functional.cross_entropy(logits, labels, reduction="sum")
    logits = loaded.model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None])).logits[0]
    labeled = torch.tensor(loss_mask.nonzero()[0])
    return functional.cross_entropy(logits[labeled - 1], tokens[labeled], reduction="sum")
