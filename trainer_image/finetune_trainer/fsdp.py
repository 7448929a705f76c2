"""Split: a Learner on PyTorch's FSDP2 (`fully_shard`): weights, gradients and moments are split over the ranks.

Chosen by `assembly`. A layer is whole only while it is computed. Rank 0 alone reads the model; the others start from
its outline (`model.load(outline=True)`) and get each layer's weights just before that layer is split, so that no other
rank ever holds more than its share and one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.learner import MOMENTS, Extent, Stored, to_cpu, trained
from finetune_trainer.model import layers
from finetune_trainer.optimizers import Recipe, adamw, set_rate
from finetune_trainer.world import World


class Split:
    """`offload`: weights, gradients and moments rest in the host's memory while they aren't used."""

    alone = False  # ranks meet inside forward and backward

    def __init__(self, model: Any, recipe: Recipe, world: World, *, offload: bool) -> None:
        self._world = world
        self._max_norm = recipe.max_grad_norm or math.inf
        self._home = torch.device("cpu") if offload else world.device
        _split(model, world, offload=offload)
        self._model = model
        self._optimizer = adamw(trained(model), recipe, fused=True)
        self._parameters = trained(model)

    @property
    def model(self) -> Any:
        return self._model

    @property
    def plain(self) -> Any:
        return self._model

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients meet after each micro-batch: to wait for the last one would keep them whole until then."""
        yield

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        parameters = list(self._parameters.values())
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        whole = _whole(total, self._world)
        norm = float(whole)
        if math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, whole.to(self._home))
            set_rate(self._optimizer, rate)
            self._optimizer.step()
        self.forget()
        return norm

    def forget(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        return self._gathered(self._parameters)

    def moments(self) -> dict[str, Tensor]:
        state = self._optimizer.state
        return self._gathered(
            {
                f"{moment}/{name}": state[parameter][moment]
                for name, parameter in self._parameters.items()
                for moment in MOMENTS
                if parameter in state
            }
        )

    def extents(self) -> dict[str, Extent]:
        return {name: self._extent(parameter) for name, parameter in self._parameters.items()}

    def own_weights(self) -> dict[str, Tensor]:
        return {name: _held(parameter) for name, parameter in self._parameters.items()}

    def own_moments(self) -> dict[str, Tensor]:
        state = self._optimizer.state
        return {
            f"{moment}/{name}": _held(state[parameter][moment])
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def set_moments(self, moments: Stored, steps: int) -> None:
        for name, parameter in self._parameters.items():
            own = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
            for moment, value in own.items():
                self._hold(value, moments, f"{moment}/{name}")
            self._optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=self._home), **own}

    def set_weights(self, weights: Stored) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what an evaluation left whole would be computed with as it was
        for name, parameter in self._parameters.items():
            self._hold(parameter, weights, name)

    def _extent(self, split: Any) -> Extent:
        """FSDP2 cuts the first dimension, as torch.chunk does."""
        rows = split.shape[0]
        first = min(-(-rows // self._world.size) * self._world.rank, rows)
        return Extent(tuple(split.shape), first * math.prod(split.shape[1:]), split.to_local().numel())

    def _hold(self, split: Any, tensors: Stored, name: str) -> None:
        extent = self._extent(split)
        with torch.no_grad():
            local = split.to_local()
            local.copy_(tensors.part(name, extent.offset, extent.length).view(local.shape))

    def _gathered(self, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        """One at a time, so that a rank never holds more than one whole; only rank 0 keeps them."""
        kept: dict[str, Tensor] = {}
        for name, part in parts.items():
            whole = _whole(part, self._world)
            if self._world.is_first:
                kept[name] = to_cpu(whole)
        return kept


def _split(model: Any, world: World, *, offload: bool) -> None:
    """Layer by layer, then what is left around them (embeddings, head, norms)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy()
    for unit in [*layers(model), model]:
        _fill(unit, world)
        fully_shard(unit, mesh=mesh, offload_policy=policy)


def _fill(unit: torch.nn.Module, world: World) -> None:
    """Rank 0's weights and buffers for every rank, on its device. Weights that are tied stay tied."""
    from torch.distributed.tensor import DTensor

    sent: dict[int, Any] = {}
    for module in unit.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in sent:
                value = _from_first(parameter.data, world)
                sent[id(parameter)] = parameter, torch.nn.Parameter(value, parameter.requires_grad)
            module._parameters[name] = sent[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _from_first(buffer, world)


def _from_first(value: Tensor, world: World) -> Tensor:
    here = value.to(world.device) if world.is_first else torch.empty_like(value, device=world.device)
    dist.broadcast(here, src=0)
    return here


def _whole(part: Any, world: World) -> Tensor:
    """Of a split tensor; gathered on the device that the ranks talk through."""
    whole: Tensor = part.to(world.device).full_tensor()
    return whole


def _held(split: Any) -> Tensor:
    """This rank's part, flat."""
    return to_cpu(split.to_local()).reshape(-1)
