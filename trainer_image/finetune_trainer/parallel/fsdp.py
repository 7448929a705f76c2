"""Implements full sharding: weights, gradients and moments are split over the ranks (fsdp).

It uses PyTorch's FSDP2 (`fully_shard`), which gathers a layer only while that layer is computed. In
a run in half precision it gathers the layer in that format, and reduces gradients in float32.
`fsdp_shards` divides the weights.

On a mesh of two dimensions, each node gathers weights and scatters gradients among its own ranks,
and gradients are summed over the nodes once per step. In a checkpoint, each copy of the model
stores its own part of every shard, so the format is that of a mesh of one dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.parallel.fsdp_shards import FROM_RANK_0, Mesh, WeightSource, shard_model
from finetune_trainer.parallel.gradient_clipping import clip_by_global_norm
from finetune_trainer.parallel.optimizers import OptimizerConfig, adamw, set_rate
from finetune_trainer.parallel.strategy import MOMENTS, Extent, TensorSource, to_cpu, trained
from finetune_trainer.parallel.world import World


class FullyShardedDataParallel:
    """Keeps a shard of everything on each rank, of each of the `replicas` copies of the model.

    With `offload`, weights, gradients and moments stay in the host's memory until they are needed.
    """

    independent_micro_batches = False  # ranks communicate in forward and backward passes

    def __init__(
        self,
        model: Any,
        config: OptimizerConfig,
        world: World,
        *,
        offload: bool,
        half: torch.dtype | None = None,
        source: WeightSource = FROM_RANK_0,
        replicas: int = 1,
    ) -> None:
        self._world = world
        self._mesh = Mesh.of(world, replicas)
        self._adapters = source.adapters
        self._half = half
        self._max_norm = config.max_grad_norm
        self._storage_device = torch.device("cpu") if offload else world.device
        shard_model(model, self._mesh, offload=offload, half=half, source=source)
        self._model = model
        self._optimizer = adamw(trained(model), config, fused=True)
        self._parameters = trained(model)
        self._all_parameters = dict(model.named_parameters())

    @property
    def model(self) -> Any:
        return self._model

    @property
    def unwrapped(self) -> Any:
        return self._model

    def autocast(self, model: Any) -> AbstractContextManager[Any]:
        """Returns a context that does nothing.

        The weights are gathered in the format of the products. Autocast would convert weights that
        were gathered in float32, and keep all copies until the end of the forward pass.
        """
        return nullcontext()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Returns a context that reduces gradients as far as memory demands.

        On a mesh of one dimension, they are reduced after each micro-batch: waiting for the last
        one would keep them unsharded until then. With several copies of the model, the copies
        communicate only after the last micro-batch. The gradients of adapters are small, so until
        then they stay unsharded, and the ranks of a copy don't communicate, either.
        """
        if self._mesh.replicas > 1 and self._adapters:
            self._model.set_requires_gradient_sync(last)
        elif self._mesh.replicas > 1:
            self._model.set_requires_all_reduce(last)
        yield

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        norm = clip_by_global_norm(list(self._parameters.values()), self._max_norm, self._full_norm)
        if math.isfinite(norm):
            set_rate(self._optimizer, rate)
            self._optimizer.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def gathered_bytes(self) -> int:
        return sum(
            parameter.numel()
            * (self._half if self._half and parameter.is_floating_point() else parameter.dtype).itemsize
            for parameter in self._model.parameters()
        )

    @contextmanager
    def gathered(self) -> Iterator[None]:
        outermost, *layers = self._sharded_modules()
        for module in (outermost, *layers):
            module.unshard()
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True, recurse=False)
            for module in (outermost, *layers):
                module.reshard()
                _forget_forward_passes(module)

    def weights(self) -> dict[str, Tensor]:
        return self._gathered(self._parameters)

    def gather(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Converts the shards first, so that what is sent is no larger than what is written."""
        full = _full(self._all_parameters[name].detach().to(dtype), self._world)
        return to_cpu(full, dtype) if self._world.is_first else None

    def optimizer_state(self) -> dict[str, Tensor]:
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
        return {name: self._own_part(parameter) for name, parameter in self._parameters.items()}

    def own_optimizer_state(self) -> dict[str, Tensor]:
        state = self._optimizer.state
        return {
            f"{moment}/{name}": self._own_part(state[parameter][moment])
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def set_optimizer_state(self, moments: TensorSource, steps: int) -> None:
        for name, parameter in self._parameters.items():
            state = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
            for moment, value in state.items():
                self._load_part(value, moments, f"{moment}/{name}")
            step = torch.tensor(float(steps), device=self._storage_device)
            self._optimizer.state[parameter] = {"step": step, **state}

    def set_weights(self, weights: TensorSource) -> None:
        for module in self._sharded_modules():
            # A layer that an evaluation left gathered would be computed with its old weights.
            module.reshard()
        for name, parameter in self._parameters.items():
            self._load_part(parameter, weights, name)

    def _sharded_modules(self) -> list[Any]:
        """Returns the model, whose own weights are those outside of the layers, and the layers."""
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self._model.modules() if isinstance(module, FSDPModule)]

    def _full_norm(self, norm: Tensor) -> Tensor:
        return _full(norm, self._world).to(self._storage_device)

    def _extent(self, sharded: Any) -> Extent:
        """Returns which part of a sharded tensor this rank stores in a checkpoint."""
        first = self._mesh.first_row(sharded.shape[0]) * math.prod(sharded.shape[1:])
        own = self._mesh.own_range(sharded.to_local().numel())
        return Extent(tuple(sharded.shape), first + own.start, len(own))

    def _own_part(self, sharded: Any) -> Tensor:
        """Returns a flat copy, on the CPU, of what `_extent` describes."""
        shard = sharded.to_local().reshape(-1)
        own = self._mesh.own_range(len(shard))
        return to_cpu(shard[own.start : own.stop])

    def _load_part(self, sharded: Any, tensors: TensorSource, name: str) -> None:
        """Copies this rank's shard of the tensor `name` into a sharded tensor. Each copy of the
        model reads its own part, and sends it to the others."""
        extent = self._extent(sharded)
        with torch.no_grad():
            shard = sharded.to_local().view(-1)
            own = self._mesh.own_range(len(shard))
            shard[own.start : own.stop].copy_(tensors.part(name, extent.offset, extent.length))
            self._mesh.exchange(shard)

    def _gathered(self, sharded_tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """Gathers one tensor at a time, so that only rank 0, which keeps them, holds more than
        one."""
        gathered: dict[str, Tensor] = {}
        for name, sharded in sharded_tensors.items():
            full = _full(sharded, self._world)
            if self._world.is_first:
                gathered[name] = to_cpu(full)
        return gathered


def _forget_forward_passes(module: Any) -> None:
    """Makes FSDP2 forget the order of forward passes since the last backward pass.

    The next backward pass would gather weights ahead of time in the reverse order, and ranks that
    computed different numbers of tokens would wait for different weights.
    """
    state = module._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for group in state._fsdp_param_groups:
        group._post_forward_indices.clear()


def _full(sharded: Any, world: World) -> Tensor:
    """Gathers a sharded tensor on the device that the ranks use to communicate."""
    full: Tensor = sharded.to(world.device).full_tensor()
    return full
