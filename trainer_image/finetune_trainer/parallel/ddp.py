"""Implements data parallelism: every rank holds the full model, gradients and optimizer state
(strategy ddp)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.parallel.gradient_clipping import clip_by_global_norm
from finetune_trainer.parallel.network import gradients
from finetune_trainer.parallel.optimizers import Optimizer, OptimizerConfig
from finetune_trainer.parallel.strategy import TensorSource, autocast, to_cpu, trained
from finetune_trainer.parallel.world import World


class DataParallel:
    """Keeps everything on every rank.

    Gradients are averaged once per step, after all ranks have reported that theirs are complete, so
    a rank that runs out of memory in a micro-batch doesn't leave the other ranks waiting, unless
    they share its rows.
    """

    def __init__(
        self,
        model: Any,
        config: OptimizerConfig,
        world: World,
        half: torch.dtype | None = None,
        message: torch.dtype = torch.float32,
    ) -> None:
        """`half` is the half-precision format of matrix products, or None for that of the weights.
        Gradients are sent in the number format `message`."""
        self._world = world
        self._half = half
        self._message = message
        self._max_norm = config.max_grad_norm
        self._model = model.to(world.device)
        self._parameters = trained(model)
        self._optimizer = Optimizer(model, self._parameters, config)
        self._buckets = gradients.buckets(list(self._parameters.values()))
        if world.size > 1:
            for parameter in self._parameters.values():
                dist.broadcast(parameter.data, src=0)

    @property
    def independent_micro_batches(self) -> bool:
        return not self._world.sequence

    @property
    def model(self) -> Any:
        return self._model

    @property
    def unwrapped(self) -> Any:
        return self._model

    def autocast(self, model: Any) -> AbstractContextManager[Any]:
        return autocast(self._world.device, self._half)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        if self._world.size > 1:
            for bucket in self._buckets:
                gradients.average(bucket, self._world, self._message)
        norm = clip_by_global_norm(list(self._parameters.values()), self._max_norm)
        if math.isfinite(norm):
            self._optimizer.step(rate)
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    @property
    def gathered_bytes(self) -> int:
        return 0

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        if not self._world.is_first:
            return {}
        return {name: to_cpu(parameter) for name, parameter in self._parameters.items()}

    def gather(self, name: str, dtype: torch.dtype) -> Tensor | None:
        return to_cpu(self._model.get_parameter(name), dtype) if self._world.is_first else None

    def optimizer_state(self) -> dict[str, Tensor]:
        if not self._world.is_first:
            return {}
        return self._optimizer.state()

    def set_optimizer_state(self, moments: TensorSource, steps: int) -> None:
        self._optimizer.set_state(moments, steps)

    def set_weights(self, weights: TensorSource) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
