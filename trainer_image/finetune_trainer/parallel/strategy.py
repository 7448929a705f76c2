"""Defines ParallelStrategy: one interface to a model, its optimizer, and how both are distributed
over the ranks.

The training loop never asks which strategy it runs with; `ddp`, `deepspeed` and `fsdp` implement
the interface. Weights and moments are returned and set by parameter name and in float32, so a
checkpoint fits any strategy. They are returned gathered on rank 0, or as the part that each rank
holds (`ShardedStrategy`), and are set from a `TensorSource`, from which every rank reads the part
that it holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state for a weight: the first and the second moment of its gradient."""


class TensorSource(Mapping[str, Tensor]):
    """Maps names to tensors, each of which is read only when it is requested."""

    @abstractmethod
    def part(self, name: str, offset: int, length: int) -> Tensor:
        """Returns `length` values of a tensor, starting at `offset`, flat, in row-major order."""


class ParallelStrategy(Protocol):
    """Distributes a model and its optimizer over the ranks.

    All ranks must call each method at the same time, unless its docstring says otherwise.
    """

    @property
    def independent_micro_batches(self) -> bool:
        """Whether a rank computes its micro-batches without communicating. If one of them fails,
        the rank can still take part in the communication that follows."""
        ...

    @property
    def model(self) -> Any:
        """The model to train: through it, the strategy takes part in forward passes."""
        ...

    @property
    def unwrapped(self) -> Any:
        """The model without the strategy's wrapper, for generating text."""
        ...

    def autocast(self, model: Any) -> AbstractContextManager[Any]:
        """Returns the context in which `model`, which is one of the two above, must be called to
        compute its matrix products in the run's number format."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Returns a context for the forward and backward passes of a micro-batch; `last` marks the
        last micro-batch of a step."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds this rank's gradients.

        They are averaged over the ranks, so `loss` must have been multiplied by the world size.
        """
        ...

    def step(self, rate: float) -> float:
        """Clips the gradients, updates the weights with this learning rate, and drops the
        gradients.

        Returns the global norm of the gradients before clipping. If it isn't finite, no weight
        changes.
        """
        ...

    def zero_grad(self) -> None:
        """Drops the gradients; weights and moments stay unchanged."""
        ...

    @property
    def gathered_bytes(self) -> int:
        """The bytes that each rank needs for the full model inside `gathered`; 0 if it has it
        anyway."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Returns a context in which every rank has the full model, and `unwrapped` computes
        without communicating. The weights are sent once, at its beginning, in the number format
        in which the strategy computes."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Returns the trained weights by name on rank 0's CPU, and nothing on the other ranks."""
        ...

    def gather(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Returns one weight of the model, trained or not, in the number format `dtype` on rank 0's
        CPU, and None on the other ranks. `name` is the same on all ranks."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Returns the optimizer state by `<key>/<parameter>`, e.g. exp_avg/…, on rank 0's CPU, and
        nothing on the other ranks."""
        ...

    def set_optimizer_state(self, moments: TensorSource, steps: int) -> None:
        """Restores the state of an optimizer that has done `steps` steps.

        Every rank reads the same tensors in the same order.
        """
        ...

    def set_weights(self, weights: TensorSource) -> None:
        """Replaces the trained weights. Every rank reads the same tensors in the same order."""
        ...


@dataclass(frozen=True)
class Extent:
    """Describes a contiguous part of a tensor of this shape: `length` of its values in row-major
    order, starting at `offset`."""

    shape: tuple[int, ...]
    offset: int
    length: int


@runtime_checkable
class ShardedStrategy(ParallelStrategy, Protocol):
    """Describes a strategy whose ranks each hold a part of every weight and of its moments.

    Together, the parts are the full tensors, with each value exactly once.
    """

    def extents(self) -> dict[str, Extent]:
        """Returns which part of each weight, and of each of its moments, this rank holds."""
        ...

    def own_weights(self) -> dict[str, Tensor]:
        """Returns this rank's part of each weight, flat, on the CPU, without communicating."""
        ...

    def own_optimizer_state(self) -> dict[str, Tensor]:
        """Returns this rank's part of each moment, flat, on the CPU, without communicating."""
        ...


def autocast(device: torch.device, half: torch.dtype | None) -> AbstractContextManager[Any]:
    """Returns a context in which matrix products are computed in the half-precision format `half`,
    or, if it is None, in that of the weights."""
    return torch.autocast(device.type, half, enabled=half is not None)


def trained(model: Any) -> dict[str, Any]:
    """Returns the trained parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def to_cpu(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a contiguous copy on the CPU that shares no memory with `tensor`."""
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
