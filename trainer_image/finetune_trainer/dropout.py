"""Dropout for adapters on the CPU, where drawing PyTorch's own mask costs more than the adapter's matrices.

Masks come from a fast generator (SFC64) seeded by one draw of PyTorch's: so they follow torch.manual_seed, and what is
computed again in a backward pass gets the same mask. Put in by `model`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEVELS = 2**16


class Dropout(torch.nn.Module):
    """As torch.nn.Dropout, with p rounded to 1/65536; kept values are scaled by what is really kept."""

    def __init__(self, p: float, place: int) -> None:
        super().__init__()
        self.p = p
        self.place = place

    def forward(self, values: Tensor) -> Tensor:
        """Any shape."""
        if not self.training or self.p == 0.0:
            return values
        if values.device.type != "cpu":
            return torch.nn.functional.dropout(values, self.p)
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        kept = _kept(values, dropped, self.place)
        return _Masked.apply(values, kept, _LEVELS / (_LEVELS - dropped))  # type: ignore[no-any-return, no-untyped-call]


def put_in(model: torch.nn.Module) -> None:
    """In the place of PEFT's. Under autocast the values needn't be widened for the adapter, to be narrowed again."""
    places: dict[str, int] = {}
    for name, module in list(model.named_modules()):
        layers = getattr(module, "lora_dropout", None)
        if isinstance(layers, torch.nn.ModuleDict):
            place = places.setdefault(name.rpartition(".")[2], len(places))
            module.cast_input_dtype_enabled = False
            for adapter, layer in layers.items():
                if type(layer) is torch.nn.Dropout:
                    layers[adapter] = Dropout(layer.p, place)


@torch.library.custom_op("finetune::kept", mutates_args=())
def _kept(values: Tensor, dropped: int, place: int) -> Tensor:
    """A mask shaped like `values`: true with probability 1 - dropped/65536. `place` tells calls of a layer apart."""
    seed = int(torch.randint(2**62, ()).item())
    drawn = np.random.SFC64(seed).random_raw(-(-values.numel() // 4)).view(np.uint16)[: values.numel()]
    return torch.from_numpy(drawn >= dropped).view(values.shape)


@_kept.register_fake
def _(values: Tensor, dropped: int, place: int) -> Tensor:
    return torch.empty(values.shape, dtype=torch.bool)


class _Masked(torch.autograd.Function):
    """Remembers the mask as a byte a value."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (values * kept).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return (gradients[0] * kept).mul_(ctx.scale), None, None
