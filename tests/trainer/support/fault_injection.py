"""Faults of a machine. PyTorch hooks put them into a rank's process before its run starts (see
`rank_runs.RunningRanks`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    memory: a micro-batch of more than `value` tokens runs out of memory; evaluations do so too, but
    only with a model whose training ran out of memory before. gradient: the gradient is NaN if the
    micro-batch contains token `value`. slow: every forward pass with gradients takes `value` ms
    longer.
    """

    kind: Literal["memory", "gradient", "slow"]
    value: int

    def install(self) -> None:
        {"memory": _lack_memory, "gradient": _spoil_gradient, "slow": _slow_down}[self.kind](self.value)


def _lack_memory(tokens: int) -> None:
    out_of_memory: WeakSet[torch.nn.Module] = WeakSet()

    def check(module: torch.nn.Module, inputs: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and inputs[0].numel() > tokens:
            if torch.is_grad_enabled():
                out_of_memory.add(module)
            elif module not in out_of_memory:
                return
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to embed {inputs[0].numel()} tokens")

    register_module_forward_pre_hook(check)


def _spoil_gradient(token: int) -> None:
    present = False

    def spoil(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal present
        if isinstance(module, torch.nn.Embedding):
            present = bool((inputs[0] == token).any())
        if present and isinstance(module, torch.nn.Linear) and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    register_module_forward_hook(spoil)


def _slow_down(milliseconds: int) -> None:
    def wait(module: torch.nn.Module, inputs: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and torch.is_grad_enabled():
            time.sleep(milliseconds / 1000)

    register_module_forward_pre_hook(wait)
