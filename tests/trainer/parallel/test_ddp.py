"""DataParallel's step on one rank: what it applies, and what it keeps from the weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from finetune_trainer.model import freezing, loading
from finetune_trainer.parallel.ddp import DataParallel
from finetune_trainer.parallel.optimizers import OptimizerConfig
from finetune_trainer.parallel.world import World


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["NaN", "infinity"])
def test_a_gradient_that_isnt_finite_changes_neither_weights_nor_moments(
    poison: float, models: dict[str, Path]
) -> None:
    """Bug 23: one NaN among gradients reaches every weight, through the clipping by their norm."""
    loaded = freezing.unfreeze(loading.load(models["llama"], dtype=torch.float32, longest=32))
    world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
    strategy = DataParallel(loaded.model, OptimizerConfig(weight_decay=0.0, max_grad_norm=1.0), world)
    parameters = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    assert math.isfinite(strategy.step(1e-3))
    weights = {name: value.clone() for name, value in strategy.weights().items()}
    moments = {name: value.clone() for name, value in strategy.optimizer_state().items()}
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    assert parameters[0].grad is not None
    parameters[0].grad.flatten()[0] = poison
    assert not math.isfinite(strategy.step(1e-3))
    assert all(torch.equal(after, weights[name]) for name, after in strategy.weights().items())
    assert all(torch.equal(after, moments[name]) for name, after in strategy.optimizer_state().items())
    assert moments
