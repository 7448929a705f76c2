"""The same training written the plainest way: one example at a time, no batch, no ranks, no masks; for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from finetune_trainer import adapters, freezing, model, plan, schedule, seeds, tokens
from finetune_trainer.learner import trained
from finetune_trainer.render import Renderer
from trainer.ranks import Ended, Job


@dataclass(frozen=True)
class Naive:
    """Mean loss per learnt token of each step, gradient norms before clipping, and the weights at the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def examples(job: Job, cache: Path) -> tokens.Tokens:
    """The job's training rows, rendered."""
    renderer = Renderer.load(job.paths.model, job.run.data.max_sequence_length)
    return tokens.build(
        cache, "naive", job.paths.data("train"), "dataset.uri", format="auto", on_invalid="fail", renderer=renderer
    )


def schedule_of(job: Job, rows: tokens.Tokens) -> plan.Plan:
    training = job.run.training
    return plan.make(
        seed=training.seed,
        lengths=rows.lengths,
        label_counts=rows.label_counts,
        global_batch=training.global_batch_size,
        epochs=training.epochs,
        max_steps=training.max_steps,
        shape=plan.Shape(world=1, rows=1, tokens=96, packed=False),
        by_length=training.group_by_length,
    )


def train(job: Job, cache: Path) -> Naive:
    run = job.run
    loaded = model.load(job.paths.model, dtype=torch.float32, longest=run.data.max_sequence_length)
    seed = seeds.mix(run.training.seed, "lora")
    loaded = adapters.adapt(loaded, run.lora, seed) if run.lora else freezing.unfreeze(loaded)
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
    whole = schedule_of(job, rows)
    losses, norms = [], []
    for number in range(1, whole.total_steps + 1):
        step = whole.step(number)
        nll = torch.stack([_nll(loaded, rows, index) for index in step.examples]).sum() / step.label_tokens
        nll.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), run.training.max_grad_norm)))
        rate = schedule.learning_rate(number, whole.total_steps, run.training)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(nll.detach()))
    return Naive(losses, norms, {name: p.detach().clone() for name, p in parameters.items()})


def gradients(job: Job, cache: Path) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, by name, of the first step of a job that trains every weight."""
    longest = job.run.data.max_sequence_length
    loaded = freezing.unfreeze(model.load(job.paths.model, dtype=torch.float32, longest=longest))
    rows = examples(job, cache)
    step = schedule_of(job, rows).step(1)
    nll = torch.stack([_nll(loaded, rows, index) for index in step.examples]).sum() / step.label_tokens
    nll.backward()
    return float(nll.detach()), {name: p.grad.clone() for name, p in trained(loaded.model).items()}


def load_weights(ended: Ended) -> dict[str, Tensor]:
    """The trained weights of a run's last checkpoint, by the model's names."""
    newest = max(ended.paths.checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]))
    return dict(load_file(newest / "weights.safetensors"))


def _nll(loaded: model.Loaded, rows: tokens.Tokens, index: int) -> Tensor:
    ids, learnt = rows.example(index)
    source = int(rows.sources[index])
    whole = torch.tensor(ids.astype("int64"))
    if source:
        labels = whole[source:]
        logits = loaded.model(input_ids=whole[None, :source], labels=labels[None], use_cache=False).logits[0]
        return functional.cross_entropy(logits, labels, reduction="sum")
    logits = loaded.model(input_ids=whole[None], attention_mask=torch.ones_like(whole[None])).logits[0]
    at = torch.tensor(learnt.nonzero()[0])
    return functional.cross_entropy(logits[at - 1], whole[at], reduction="sum")
