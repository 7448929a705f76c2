"""Exchanges tokens for heads between the ranks that share a row (DeepSpeed-Ulysses, Jacobs et al.
2023).

Outside of attention, each rank has all heads of its part of the tokens. Before attention, the ranks
of a group exchange queries, keys and values, so that each has all tokens of its part of the heads;
attention over the whole row is then computed as if there were no other ranks, and its output is
exchanged back. Heads attend independently of each other, so nothing changes except for where they
are computed.

An all-to-all of equal parts is its own adjoint: part j of rank i becomes part i of rank j, and so
does its gradient. The gradient of a weight on one rank therefore covers what that rank computed,
and the sum over the ranks of a group is the gradient of the whole row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.data.batching.sequence_part import SequencePart, key_copies


def own_heads(part: SequencePart, heads: int) -> slice:
    """Returns which of the `heads` query heads this rank computes. Raises ValueError if they can't
    be divided equally."""
    if heads % part.size:
        raise ValueError(f"{heads} attention heads can't be divided among {part.size} ranks")
    own = heads // part.size
    return slice(part.rank * own, (part.rank + 1) * own)


def to_own_heads(part: SequencePart, heads: int, tensor: Tensor) -> Tensor:
    """Returns, for this rank's heads, all tokens of the row: (1, heads / size, length, width), from
    this rank's tokens of all heads, (1, heads, length / size, width).

    `heads` is the number of query heads. Keys and values may have fewer (grouped-query attention).
    All ranks of the group call it together.
    """
    own_heads(part, heads)
    if tensor.shape[1] != heads:
        tensor = tensor.repeat_interleave(key_copies(tensor.shape[1], part.size), dim=1)
    _, count, length, width = tensor.shape
    sent = tensor.view(part.size, count // part.size, length, width).transpose(1, 2)
    received: Tensor = all_to_all(sent.contiguous(), part.group)
    return received.view(1, part.size * length, count // part.size, width).transpose(1, 2)


def to_own_tokens(part: SequencePart, tensor: Tensor) -> Tensor:
    """Returns, for this rank's tokens, the output of all heads: (1, length / size, heads, width),
    from all tokens of this rank's heads, (1, length, heads / size, width)."""
    _, length, count, width = tensor.shape
    own = length // part.size
    received: Tensor = all_to_all(tensor.contiguous().view(part.size, own, count, width), part.group)
    return received.transpose(0, 1).reshape(1, own, part.size * count, width)


def group_sum(part: SequencePart, values: Tensor) -> Tensor:
    """Returns the sum of values over the ranks that share a row. Its gradient is that of this
    rank's values alone, since every rank differentiates its own."""
    if not part:
        return values
    total = values.detach().clone()
    dist.all_reduce(total, group=_process_group(part.group))
    return total + (values - values.detach())


def _process_group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


@torch.library.custom_op("finetune::all_to_all", mutates_args=())
def all_to_all(parts: Tensor, group: str) -> Tensor:
    """Sends part i, (ranks, …), to rank i of the process group of this name, and returns what the
    ranks sent to this one, in their order.

    It is an operator so that compiled layers can have it.
    """
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=_process_group(group))
    return received


@all_to_all.register_fake
def _(parts: Tensor, group: str) -> Tensor:
    return torch.empty_like(parts)


def _save_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return all_to_all(gradient.contiguous(), ctx.group), None


all_to_all.register_autograd(_backward, setup_context=_save_group)
