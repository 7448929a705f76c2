"""Faults of a machine, put into a rank's process before it begins (see `ranks.Ranks`), by hooks of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@dataclass(frozen=True)
class Fault:
    """memory: a micro-batch of more than `value` tokens has none; in a model where one hadn't, evaluations neither.
    gradient: it is NaN where token `value` is learnt."""

    kind: Literal["memory", "gradient"]
    value: int

    def install(self) -> None:
        {"memory": _lack_memory, "gradient": _spoil_gradient}[self.kind](self.value)


def _lack_memory(tokens: int) -> None:
    lacking: WeakSet[torch.nn.Module] = WeakSet()

    def check(module: torch.nn.Module, inputs: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and inputs[0].numel() > tokens:
            if torch.is_grad_enabled():
                lacking.add(module)
            elif module not in lacking:
                return
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to embed {inputs[0].numel()} tokens")

    register_module_forward_pre_hook(check)


def _spoil_gradient(token: int) -> None:
    here = False

    def spoil(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal here
        if isinstance(module, torch.nn.Embedding):
            here = bool((inputs[0] == token).any())
        if here and isinstance(module, torch.nn.Linear) and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    register_module_forward_hook(spoil)
