"""Averages the gradients of replicated weights over the ranks, in messages of a limited size."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.parallel.limits import GRADIENT_BUCKET
from finetune_trainer.parallel.world import World


def buckets(parameters: list[Any]) -> list[list[Any]]:
    """Returns the parameters in their order, divided into lists whose gradients are each sent in
    one message.

    A bucket ends with the parameter that fills it up to GRADIENT_BUCKET values.
    """
    filled: list[list[Any]] = []
    size = GRADIENT_BUCKET
    for parameter in parameters:
        if size >= GRADIENT_BUCKET:
            filled.append([])
            size = 0
        filled[-1].append(parameter)
        size += parameter.numel()
    return filled


def average(parameters: list[Any], world: World, message: torch.dtype = torch.float32) -> None:
    """Replaces the gradients with their mean over all ranks, sent in the number format `message`,
    which is float32 or bfloat16. All ranks have the same bits afterwards.

    A gradient that a rank lacks counts as zeros. A gradient that no rank has stays None.
    """
    if message == torch.float32:
        _average_in_float32(parameters, world)
    else:
        _average_rounded(parameters, world, message)


def _average_in_float32(parameters: list[Any], world: World) -> None:
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=world.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([*(gradient.reshape(-1) for gradient in gradients), present])
    dist.all_reduce(message)
    *means, present = torch.split(message.div_(world.size), [*(p.numel() for p in parameters), len(parameters)])
    for parameter, mean, on_any_rank in zip(parameters, means, present.tolist(), strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype) if on_any_rank else None


def _average_rounded(parameters: list[Any], world: World, dtype: torch.dtype) -> None:
    """Sends half of the bytes. Each value is rounded when it is sent, and so is each mean.

    A reduction by the network would add up rounded sums. Here, each rank gets a share of all
    gradients, adds them up in float32 in the order of the ranks, and sends the rounded means.
    Both messages only move bytes, which every backend can send.
    """
    sizes = [*(parameter.numel() for parameter in parameters), len(parameters)]
    share = -(-sum(sizes) // world.size)
    message = torch.zeros(share * world.size, dtype=dtype, device=world.device)
    *parts, present, _ = torch.split(message, [*sizes, share * world.size - sum(sizes)])
    for parameter, part in zip(parameters, parts, strict=True):
        if parameter.grad is not None:
            part.copy_(parameter.grad.reshape(-1))
    present.copy_(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
    received = torch.empty_like(message)
    dist.all_to_all_single(_bytes(received), _bytes(message))
    first, *others = torch.split(received, share)
    total = first.float()
    for other in others:
        total.add_(other)
    dist.all_gather_into_tensor(_bytes(message), _bytes(total.div_(world.size).to(dtype)))
    for parameter, mean, on_any_rank in zip(parameters, parts, present.tolist(), strict=True):
        if not on_any_rank:
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = mean.to(parameter.dtype).view_as(parameter)
        else:
            parameter.grad.copy_(mean.view_as(parameter))


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8)
