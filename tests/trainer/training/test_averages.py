"""A global batch has one mean over its trained tokens: the loss and every gradient are the same,
however the batch is divided. Evaluation splits are tested in the same way.

Gradients are read from the first checkpoint: AdamW's first moment after one step is a tenth of the
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from finetune_api.messages import events
from finetune_trainer.checkpoint import local_folder
from testkit.rows import pairs
from trainer.support import reference_implementation
from trainer.support.rank_runs import FinishedRun, Job, finish_each, prepare

_CUTS = [(1, 1), (1, 4), (2, 1), (2, 2)]  # (world size, micro-batches of a rank in a step)
_WAYS: dict[str, dict[str, Any]] = {
    f"{family}, {world} x {accumulation}{', padded' if padded else ''}": {
        "family": family, "world": world, "accumulation": accumulation, "padded": padded,
    }
    for family, padded in (("llama", False), ("llama", True), ("t5", True))
    for world, accumulation in _CUTS
}  # fmt: skip
_SHARDED: dict[str, dict[str, Any]] = {
    f"{family}, {strategy}": {
        "family": family, "world": 2, "accumulation": 2, "padded": True, "strategy": strategy,
    }
    for family, strategy in (
        ("llama", "zero1"), ("llama", "zero2"), ("llama", "zero3"), ("llama", "fsdp"), ("t5", "zero2"),
        ("t5", "zero3"), ("t5", "fsdp"),
    )
}  # fmt: skip
_EVALUATIONS = [(1, 1), (1, 4), (1, 7), (2, 4), (3, 2)]  # (world size, rows at a time)


def _batch(folder: Path, models: dict[str, Path], way: dict[str, Any]) -> Job:
    """One step over 8 rows of different lengths; every weight is trained, so every weight has a
    gradient."""
    world, size = way["world"], 8 // (way["world"] * way["accumulation"])
    if not way["padded"] and way["accumulation"] > 1:  # a packed micro-batch is limited by tokens, and rows are short
        size = max(1, size // 2)
    return prepare(
        folder,
        models[way["family"]],
        pairs(8),
        world=world,
        strategy=way.get("strategy", "ddp"),
        full=True,
        data={"packing": not way["padded"]},
        training={"max_steps": 1, "micro_batch_size": size, "max_grad_norm": 0.0},
        every=1,
    )


def _evaluation(folder: Path, models: dict[str, Path], world: int, rows: int) -> Job:
    return prepare(
        folder,
        models["llama"],
        pairs(8),
        world=world,
        data={"packing": False},
        validation=pairs(7, 1),
        training={"max_steps": 1, "micro_batch_size": rows},
        every=1,
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[Any, FinishedRun]:
    root = tmp_path_factory.mktemp("averages")
    jobs: dict[Any, Job] = {
        name: _batch(root / str(index), models, way) for index, (name, way) in enumerate({**_WAYS, **_SHARDED}.items())
    }
    jobs |= {cut: _evaluation(root / f"{cut[0]}-{cut[1]}", models, *cut) for cut in _EVALUATIONS}
    return finish_each(jobs)


@dataclass(frozen=True)
class Exact:
    """sum(nll) / sum(tokens) over the 8 rows, one row at a time, and its gradients from
    autograd."""

    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Exact]:
    root, by_family = tmp_path_factory.mktemp("exact"), {}
    for family in ("llama", "t5"):
        job = _batch(root / family, models, {"family": family, "world": 1, "accumulation": 1, "padded": True})
        by_family[family] = Exact(*reference_implementation.gradients(job, root / f"{family}-tokens"))
    return by_family


def _equals(run: FinishedRun, exact: Exact) -> None:
    assert run.losses == pytest.approx([exact.loss], abs=1e-6)
    moments = load_file(run.paths.checkpoints / "step-1" / local_folder.OPTIMIZER)
    names = {name.removeprefix("exp_avg/") for name in moments if name.startswith("exp_avg/")}
    assert names == exact.gradients.keys()
    for name, gradient in exact.gradients.items():
        assert (moments[f"exp_avg/{name}"] * 10 - gradient).abs().max() < 2e-6, name


@pytest.mark.parametrize("way", [way for way in _WAYS if "llama" in way])
def test_a_mean_of_means(way: str, ended: dict[Any, FinishedRun], exact: dict[str, Exact]) -> None:
    """Bug 1: micro-batches or ranks with few tokens weigh as much as those with many."""
    _equals(ended[way], exact["llama"])


@pytest.mark.parametrize("way", [way for way in _WAYS if "t5" in way])
def test_a_loss_that_the_model_averages_itself(
    way: str, ended: dict[Any, FinishedRun], exact: dict[str, Exact]
) -> None:
    """Bug 2: T5's own loss is a mean; a trainer that expects a sum multiplies it by micro-batches
    and ranks."""
    _equals(ended[way], exact["t5"])


@pytest.mark.parametrize("way", _SHARDED)
def test_a_strategy_that_divides_by_accumulation_again(
    way: str, ended: dict[Any, FinishedRun], exact: dict[str, Exact]
) -> None:
    """Bug 22: DeepSpeed and Accelerate each divide by accumulation themselves."""
    _equals(ended[way], exact[_SHARDED[way]["family"]])


def test_an_evaluation_that_depends_on_the_batch_size(ended: dict[Any, FinishedRun]) -> None:
    """Bug 3: the mean of batches' means weights the last, smaller batch like the others."""
    evaluations = [ended[cut].evals("validation") for cut in _EVALUATIONS]
    assert list(evaluations[0]) == [1]
    for other in evaluations[1:]:
        assert other == pytest.approx(evaluations[0], abs=2e-6)
    labels = {event.label_tokens for cut in _EVALUATIONS for event in ended[cut].events(events.EvalEvent)}
    assert len(labels) == 1
