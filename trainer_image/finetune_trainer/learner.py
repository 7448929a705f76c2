"""Learner: the model, its optimizer and how both are spread over the ranks, behind one interface.

Chosen once by `assembly`; the loop never asks which it is. `Replicated` (ddp) is here, `Sharded` (ZeRO) in `zero`,
`Split` (FSDP2) in `fsdp`.
Weights and moments go in and out by parameter name and in float32, so a checkpoint fits any strategy: out whole, or
as the part that a rank holds (`Divided`); in as `Stored`, of which every rank reads what it holds.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.optimizers import Optimizer, Recipe
from finetune_trainer.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
_TOGETHER = 16 * 2**20  # elements of gradients that are sent at once


class Stored(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for. Made in `stored`."""

    @abstractmethod
    def part(self, name: str, offset: int, length: int) -> Tensor:
        """So many of a tensor's values, flat, in row-major order."""


class Learner(Protocol):
    """All methods are called by all ranks at the same time, unless they say otherwise."""

    @property
    def alone(self) -> bool:
        """Whether a rank computes its micro-batches without the others: one that fails there can still take part in
        what comes after."""
        ...

    @property
    def model(self) -> Any:
        """What the loop calls: forward passes through it are seen by the strategy."""
        ...

    @property
    def plain(self) -> Any:
        """The model without its wrapper, for generating text."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients meet after the last one."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds this rank's gradients. They are averaged over ranks, so the loss comes in times the world size."""
        ...

    def step(self, rate: float) -> float:
        """Clips, steps and forgets the gradients; returns the norm before clipping.

        Where the norm isn't finite, nothing is changed.
        """
        ...

    def forget(self) -> None:
        """Drops the gradients; weights and moments stay what they are."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Trained weights on rank 0's CPU; empty on other ranks."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as `<what>/<name>`, e.g. exp_avg/…, on rank 0's CPU; empty on other ranks."""
        ...

    def set_moments(self, moments: Stored, steps: int) -> None:
        """Goes on as if `steps` steps had been done. Every rank asks for the same tensors in the same order."""
        ...

    def set_weights(self, weights: Stored) -> None:
        """As if they had been trained. Every rank asks for the same tensors in the same order."""
        ...


@dataclass(frozen=True)
class Extent:
    """Part of a tensor of this shape: so many of its values, from an offset, flat."""

    shape: tuple[int, ...]
    offset: int
    length: int


@runtime_checkable
class Divided(Learner, Protocol):
    """A learner whose ranks hold a part of each weight and its moments; all parts together are the whole, once."""

    def extents(self) -> dict[str, Extent]:
        """What this rank holds of each weight, and of each of its moments."""
        ...

    def own_weights(self) -> dict[str, Tensor]:
        """That part of each weight, flat, on the CPU. Nothing is sent."""
        ...

    def own_moments(self) -> dict[str, Tensor]:
        """That part of each moment, flat, on the CPU. Nothing is sent."""
        ...


def trained(model: Any) -> dict[str, Any]:
    """Parameters that learn, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Replicated:
    """Every rank holds everything. Gradients meet once a step, after all ranks have said that theirs are whole: a rank
    that ran out of memory in a micro-batch leaves nobody waiting."""

    alone = True

    def __init__(self, model: Any, recipe: Recipe, world: World) -> None:
        self._world = world
        self._max_norm = recipe.max_grad_norm or math.inf
        self._model = model.to(world.device)
        self._parameters = trained(model)
        self._optimizer = Optimizer(model, self._parameters, recipe)
        self._parts = parts(list(self._parameters.values()))
        if world.size > 1:
            for parameter in self._parameters.values():
                dist.broadcast(parameter.data, src=0)

    @property
    def model(self) -> Any:
        return self._model

    @property
    def plain(self) -> Any:
        return self._model

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        if self._world.size > 1:
            for part in self._parts:
                average(part, self._world)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._max_norm))
        if math.isfinite(norm):
            self._optimizer.step(rate)
        self.forget()
        return norm

    def forget(self) -> None:
        self._optimizer.forget()

    def weights(self) -> dict[str, Tensor]:
        if not self._world.is_first:
            return {}
        return {name: to_cpu(parameter) for name, parameter in self._parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        if not self._world.is_first:
            return {}
        return self._optimizer.state()

    def set_moments(self, moments: Stored, steps: int) -> None:
        self._optimizer.set_state(moments, steps)

    def set_weights(self, weights: Stored) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])


def parts(parameters: list[Any]) -> list[list[Any]]:
    """The parameters in their order, cut where enough of them are together to be sent at once."""
    cut: list[list[Any]] = []
    size = _TOGETHER
    for parameter in parameters:
        if size >= _TOGETHER:
            cut.append([])
            size = 0
        cut[-1].append(parameter)
        size += parameter.numel()
    return cut


def average(parameters: list[Any], world: World) -> None:
    """Gradients become their mean over all ranks, in one message. One that no rank has stays away."""
    none = [parameter.grad is None for parameter in parameters]
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    seen = torch.tensor([float(not absent) for absent in none], device=world.device)
    whole = torch.cat([*(grad.reshape(-1) for grad in own), seen])
    dist.all_reduce(whole)
    *means, seen = torch.split(whole.div_(world.size), [*(p.numel() for p in parameters), len(parameters)])
    for parameter, mean, anywhere in zip(parameters, means, seen.tolist(), strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype) if anywhere else None


def assert_same_world(accelerator: Any, world: World) -> None:
    """Accelerate can believe in a world of its own, silently: then every rank would train on the same rows."""
    seen = (accelerator.num_processes, accelerator.process_index)
    if seen != (world.size, world.rank):
        raise RuntimeError(f"Accelerate sees (world, rank) {seen} instead of {(world.size, world.rank)}")


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy of its own, in float32."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
