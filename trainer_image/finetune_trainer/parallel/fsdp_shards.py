"""Divides a model's weights over the ranks, for fsdp.

If the model's files have the number format that the run needs, or a shorter one that is trained in
float32, each rank copies only its own rows from the mapped files to its device. Otherwise, only
rank 0 reads the model, and the others start from its outline (`loading.load(outline=True)`) and
receive one weight at a time. No other rank ever holds more than its shard and one weight. A 4-bit
weight is sharded as the bytes that it is packed in; its constants, a byte for each 64 values, are
complete on every rank.

The ranks form a mesh (`Mesh`). It has one dimension, in which all ranks share the model, or two:
then every node holds the whole model, and shards it over its own ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.model import quantization
from finetune_trainer.model.loading import layers
from finetune_trainer.parallel import messages
from finetune_trainer.parallel.world import COLLECTIVE_TIMEOUT, World


@dataclass(frozen=True)
class WeightSource:
    """Says where ranks find the weights that they shard.

    If `mapped`, every rank has those of the base, as views of files that all ranks of a node share;
    otherwise, rank 0 sends them. Adapters always come from rank 0. `dtype` is the number format of
    the base's shards, or None for that of the weights.
    """

    mapped: bool = False
    adapters: bool = False
    dtype: torch.dtype | None = None

    def has(self, parameter: Any) -> bool:
        """Returns whether every rank has this weight."""
        return self.mapped and not (self.adapters and parameter.requires_grad)


FROM_RANK_0 = WeightSource()


@dataclass(frozen=True)
class Mesh:
    """Describes which part of the model a rank holds.

    There are `replicas` copies of the model, each sharded over `shards` ranks. This rank holds
    shard number `shard` of copy number `replica`. `device_mesh` is PyTorch's.
    """

    world: World
    device_mesh: Any
    replicas: int

    @classmethod
    def of(cls, world: World, replicas: int) -> Mesh:
        """Returns the mesh of a world whose nodes, one after the other, hold `replicas` copies of
        the model. All ranks call it together."""
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        if replicas == 1:
            return cls(world, init_device_mesh(world.device.type, (world.size,)), 1)
        ranks = torch.arange(world.size).view(replicas, -1)
        # A mesh that makes its own groups gives them PyTorch's timeout instead of ours.
        groups = [
            dist.new_subgroups_by_enumeration(members.tolist(), timeout=COLLECTIVE_TIMEOUT)[0]  # type: ignore[no-untyped-call]
            for members in (ranks.T, ranks)
        ]
        device_mesh = DeviceMesh.from_group(
            groups, world.device.type, mesh=ranks, mesh_dim_names=("replicate", "shard")
        )
        return cls(world, device_mesh, replicas)

    @property
    def shards(self) -> int:
        return self.world.size // self.replicas

    @property
    def shard(self) -> int:
        return self.world.rank % self.shards

    @property
    def replica(self) -> int:
        return self.world.rank // self.shards

    def first_row(self, rows: int) -> int:
        """Returns the first row of this rank's shard of a tensor. FSDP2 divides the first
        dimension, as torch.chunk does."""
        return min(-(-rows // self.shards) * self.shard, rows)

    def own_range(self, length: int, replica: int | None = None) -> range:
        """Returns which of the `length` values of a shard this copy of the model stores in a
        checkpoint, or the copy number `replica`. Together, the copies store each value once."""
        number = self.replica if replica is None else replica
        return range(length * number // self.replicas, length * (number + 1) // self.replicas)

    def exchange(self, shard: Tensor) -> None:
        """Completes a shard, flat and on the device that trains, of which this rank has only its
        own range, by the ranges of the other copies. All ranks call it together."""
        if self.replicas == 1:
            return
        for replica in range(self.replicas):
            values = self.own_range(len(shard), replica)
            if values:
                source = replica * self.shards + self.shard
                part = shard[values.start : values.stop]
                dist.broadcast(part, src=source, group=self.device_mesh.get_group("replicate"))


def shard_model(
    model: Any,
    mesh: Mesh,
    *,
    offload: bool,
    half: torch.dtype | None,
    source: WeightSource = FROM_RANK_0,
) -> None:
    """Shards each layer, and then what remains outside of the layers (embeddings, output layer,
    norms)."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    world = mesh.world
    policy = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy()
    precision = MixedPrecisionPolicy() if half is None else MixedPrecisionPolicy(half, torch.float32)
    for unit in [*layers(model), model]:
        replaced = _replace_by_outlines(unit, world, source)
        fully_shard(unit, mesh=mesh.device_mesh, mp_policy=precision, offload_policy=policy)
        for weight in replaced:
            weight.fill(mesh, torch.device("cpu") if offload else world.device)


@dataclass
class _Weight:
    """Holds a weight of which this rank needs a shard, and the modules that use it. `value` is the
    full weight, or an outline if `everywhere` is false and this isn't rank 0."""

    value: Any
    outline: Any
    everywhere: bool
    places: list[tuple[torch.nn.Module, str]] = field(default_factory=list)

    def fill(self, mesh: Mesh, device: torch.device) -> None:
        """Replaces the sharded outline by this rank's shard, on the device that stores it. All
        ranks must call it in the same order."""
        from torch.distributed.tensor import DTensor

        module, name = self.places[0]
        sharded: Any = module._parameters[name]
        local = torch.empty(sharded.to_local().shape, dtype=sharded.dtype, device=device)
        full = self.value.data if self.everywhere else _broadcast(self.value.data, mesh.world)
        first = mesh.first_row(sharded.shape[0])
        local.copy_(full[first : first + local.shape[0]])
        shard = DTensor(local, sharded._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        parameter = torch.nn.Parameter(shard, self.value.requires_grad)
        for module, name in self.places:
            module._parameters[name] = parameter


def _replace_by_outlines(unit: torch.nn.Module, world: World, source: WeightSource) -> list[_Weight]:
    """Puts outlines into a unit, in the number format of the shards, and returns the weights that
    it had. Tied weights stay tied. Buffers come from rank 0."""
    from torch.distributed.tensor import DTensor

    weights: dict[int, _Weight] = {}
    originals = []  # keeps them alive, so that no other object gets their id
    for module in unit.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in weights:
                originals.append(parameter)
                packed = name == "weight" and quantization.is_packed(module)
                value = _packed(module, parameter, world) if packed else parameter
                everywhere = source.has(parameter)
                dtype = source.dtype if everywhere and source.dtype is not None else value.dtype
                values = torch.empty_like(value, dtype=dtype, device="meta")
                weights[id(parameter)] = _Weight(value, torch.nn.Parameter(values, value.requires_grad), everywhere)
            weight = weights[id(parameter)]
            weight.places.append((module, name))
            module._parameters[name] = weight.outline
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _broadcast(buffer, world)
    return list(weights.values())


def _packed(module: torch.nn.Module, parameter: Any, world: World) -> torch.nn.Parameter:
    """Gives a layer with a 4-bit weight rank 0's constants. Returns its packed weight, which is an
    outline on the other ranks."""
    tensors = {"": parameter.data, **quantization.constants(module)} if world.is_first else {}
    formats = {key: messages.format_of(tensor) for key, tensor in tensors.items()}
    for key, tensor_format in world.broadcast(formats, dict[str, messages.TensorFormat]).items():
        outline = tensors.get(key, messages.empty(tensor_format, "meta"))
        tensors[key] = _broadcast(outline, world) if key else outline
    return quantization.with_constants(module, tensors.pop(""), tensors, world.device)


def _broadcast(value: Tensor, world: World) -> Tensor:
    """Returns rank 0's value, on this rank's device."""
    local = value.to(world.device) if world.is_first else torch.empty_like(value, device=world.device)
    dist.broadcast(local, src=0)
    return local
