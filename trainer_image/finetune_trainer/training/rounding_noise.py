"""Measures how much rounding to bfloat16 changes the loss of a model.

Two kernels that compute the same round differently, in the last bit of what a layer returns. How
much of that reaches the loss depends on the model and grows with its layers, so no constant fits
all: a tolerance that a deep model needs would hide a real difference in a shallow one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_SEED = 1
_LAST_BIT = 2.0**-8  # relative to a number in bfloat16


def measure(layers: Sequence[torch.nn.Module], losses: Callable[[], Tensor]) -> float:
    """Returns the standard deviation of the sum of `losses()`, one per target, if the output of
    every layer is moved by about one bit. The draws are the same on every rank."""
    exact = losses()
    with _moved(layers):
        moved = losses()
    return float((moved - exact).square().sum().sqrt())


@contextmanager
def _moved(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    generator = torch.Generator().manual_seed(_SEED)

    def move(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        signs = torch.randint(0, 2, hidden.shape, generator=generator).to(hidden) * 2 - 1
        changed = (hidden.float() * (1 + _LAST_BIT * signs)).to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hooks = [layer.register_forward_hook(move) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
