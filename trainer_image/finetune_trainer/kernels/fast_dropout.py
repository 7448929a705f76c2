"""Provides dropout for adapters on the CPU, where drawing PyTorch's own mask costs more than the
adapter's matrix products.

Masks come from a fast generator (SFC64) that is seeded with one draw from PyTorch's own. They
therefore follow torch.manual_seed, and activations that are recomputed in a backward pass get the
same mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEVELS = 2**16


class Dropout(torch.nn.Module):
    """Behaves like torch.nn.Dropout; on the CPU, p is rounded to a multiple of 1/65536, and the
    scale uses the rounded probability.

    `call_index` differs between the adapted modules of one layer; see `_keep_mask`.
    """

    def __init__(self, p: float, call_index: int) -> None:
        super().__init__()
        self.p = p
        self.call_index = call_index

    def forward(self, values: Tensor) -> Tensor:
        """Returns `values`, of any shape; in training, some of them are set to zero and the others
        are scaled up."""
        if not self.training or self.p == 0.0:
            return values
        if values.device.type != "cpu":
            return torch.nn.functional.dropout(values, self.p)
        drop_levels = min(round(self.p * _LEVELS), _LEVELS - 1)
        mask = _keep_mask(values, drop_levels, self.call_index)
        return _Masked.apply(values, mask, _LEVELS / (_LEVELS - drop_levels))  # type: ignore[no-any-return, no-untyped-call]


def replace_modules(model: torch.nn.Module) -> None:
    """Replaces the dropout of PEFT's adapters.

    This also disables PEFT's cast of the inputs: under autocast, it would widen them for the
    adapter, only for them to be narrowed again.
    """
    call_indices: dict[str, int] = {}
    for name, module in list(model.named_modules()):
        layers = getattr(module, "lora_dropout", None)
        if isinstance(layers, torch.nn.ModuleDict):
            call_index = call_indices.setdefault(name.rpartition(".")[2], len(call_indices))
            module.cast_input_dtype_enabled = False
            for adapter, layer in layers.items():
                if type(layer) is torch.nn.Dropout:
                    layers[adapter] = Dropout(layer.p, call_index)


@torch.library.custom_op("finetune::keep_mask", mutates_args=())
def _keep_mask(values: Tensor, drop_levels: int, call_index: int) -> Tensor:
    """Returns a mask shaped like `values` that is true with a probability of 1 - drop_levels/65536.

    `call_index` isn't used here. It keeps torch.compile from merging the calls of a layer that have
    the same input.
    """
    seed = int(torch.randint(2**62, ()).item())
    numbers = np.random.SFC64(seed).random_raw(-(-values.numel() // 4)).view(np.uint16)[: values.numel()]
    return torch.from_numpy(numbers >= drop_levels).view(values.shape)


@_keep_mask.register_fake
def _(values: Tensor, drop_levels: int, call_index: int) -> Tensor:
    return torch.empty(values.shape, dtype=torch.bool)


class _Masked(torch.autograd.Function):
    """Multiplies values by a mask and a scale. It saves the mask with one byte per value."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (values * mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (gradients[0] * mask).mul_(ctx.scale), None, None
