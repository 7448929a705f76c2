"""Computes attention over a packed row on the CPU: in bfloat16 with the compiled kernel if it is
available, otherwise with batched matrix products.

The softmax of a token covers everything that the token attends to. Segments and shared blocks are
computed separately, and the logarithms of their sums of exponentials are used to merge the results.
The backward pass uses the sums over everything, so the gradient of every part is exact (the same
mathematics as in ring attention, Liu et al. 2023). PyTorch's flash kernel instead computes one
product per head and 32 queries, which costs several times as much for short examples.

Both directions are registered as operators, since torch.compile can't trace loops that differ from
row to row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune_trainer.data.batching.packed_layout import SharedBlock
from finetune_trainer.kernels import attention_avx512, attention_matmul, packed_row
from finetune_trainer.kernels.attention_inputs import AttentionInputs


def supports(query: Tensor, value: Tensor) -> bool:
    """Returns whether `attend` can compute attention for these tensors."""
    return query.device.type == "cpu" and query.shape[0] == 1 and query.shape[-1] == value.shape[-1]


@torch.library.custom_op("finetune::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Computes attention from (1, heads, length, size) to (1, length, heads, size).

    Also returns the logarithm of the softmax denominators, (length, heads). Batched products return
    zeros for them if there are no blocks to merge. Keys and values may have fewer heads than
    queries (grouped-query attention). Call it inside `packed_row.computing`; otherwise, it raises
    RuntimeError.
    """
    row = packed_row.required()
    if attention_avx512.supports(query, key):
        out, log_sums = row.native.forward(_by_token(query, key, value, scale))
        return out[None], log_sums
    q, k, v = (_contiguous_by_token(tensor) for tensor in (query, key, value))
    bucketed = row.bucketed(q.shape[1], k.shape[1])
    queries, keys, values = bucketed.gather_queries(q), bucketed.gather_keys(k), bucketed.gather_keys(v)
    blocks = row.layout.blocks
    outs, logs = [], []
    for bucket in bucketed.buckets:
        inputs = AttentionInputs(bucket.query(queries), bucket.key(keys), bucket.key(values), scale)
        part, log_sum = attention_matmul.forward(inputs, causal=True, with_sums=bool(blocks))
        outs.append(part.flatten(0, 2))
        logs.append(log_sum.flatten())
    out = bucketed.scatter_queries(outs)
    if not blocks:
        return out[None], out.new_zeros(out.shape[:2], dtype=attention_matmul.accumulation_dtype(query))
    log_sums = bucketed.scatter_queries(logs)
    for block in blocks:
        part, log_sum = attention_matmul.forward(_block(block, q, k, v, scale), causal=False, with_sums=True)
        readers = slice(block.first, block.last)
        _merge(out[readers], log_sums[readers], _ungrouped(part), _ungrouped(log_sum))
    return out[None], log_sums


@torch.library.custom_op("finetune::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, in their shapes. `out` and `log_sums` are what
    `attend` returned."""
    row = packed_row.required()
    if attention_avx512.supports(query, key):
        inputs = _by_token(query, key, value, scale)
        gradients = row.native.backward(inputs, gradient[0], out[0], log_sums)
        return tuple(tensor.transpose(0, 1)[None] for tensor in gradients)  # type: ignore[return-value]
    q, k, v = (_contiguous_by_token(tensor) for tensor in (query, key, value))
    d_out = gradient[0].contiguous()
    inner = (d_out.to(log_sums.dtype) * out[0]).sum(-1)
    bucketed = row.bucketed(q.shape[1], k.shape[1])
    d_outs, inners = bucketed.gather_queries(d_out), bucketed.gather_queries(inner)
    queries, keys, values = bucketed.gather_queries(q), bucketed.gather_keys(k), bucketed.gather_keys(v)
    row_sums = bucketed.gather_queries(log_sums) if row.layout.blocks else None
    parts = []
    for bucket in bucketed.buckets:
        inputs = AttentionInputs(bucket.query(queries), bucket.key(keys), bucket.key(values), scale)
        by_query, by_key, by_value = attention_matmul.backward(
            inputs, bucket.query(d_outs), bucket.query(inners), None if row_sums is None else bucket.query(row_sums),
            causal=True,
        )  # fmt: skip
        parts.append((by_query.flatten(0, 2), by_key.flatten(0, 1), by_value.flatten(0, 1)))
    d_queries, d_keys, d_values = zip(*parts, strict=True)
    dq, dk, dv = bucketed.scatter_queries(d_queries), bucketed.scatter_keys(d_keys), bucketed.scatter_keys(d_values)
    for block in row.layout.blocks:
        readers, kv_heads = slice(block.first, block.last), k.shape[1]
        by_query, by_key, by_value = attention_matmul.backward(
            _block(block, q, k, v, scale),
            *(_grouped(tensor[readers], kv_heads) for tensor in (d_out, inner, log_sums)),
            causal=False,
        )
        dq[readers] += _ungrouped(by_query)
        dk[block.begin : block.end] += by_key.transpose(0, 1)
        dv[block.begin : block.end] += by_value.transpose(0, 1)
    return tuple(tensor.to(query.dtype).transpose(0, 1)[None] for tensor in (dq, dk, dv))  # type: ignore[return-value]


def _by_token(query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionInputs:
    """Returns views of the shape (length, heads, size) of tensors of the shape (1, heads, length,
    size)."""
    return AttentionInputs(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), scale)


def _contiguous_by_token(tensor: Tensor) -> Tensor:
    """Rearranges (1, heads, length, size) into (length, heads, size)."""
    return tensor[0].transpose(0, 1).contiguous()


def _grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """Rearranges (length, heads, …) into (kv heads, queries per key, length, …)."""
    return tensor.view(len(tensor), kv_heads, tensor.shape[1] // kv_heads, *tensor.shape[2:]).movedim(0, 2)


def _ungrouped(tensor: Tensor) -> Tensor:
    """Rearranges (kv heads, queries per key, length, …) into (length, heads, …)."""
    return tensor.movedim(2, 0).flatten(1, 2)


def _block(block: SharedBlock, q: Tensor, k: Tensor, v: Tensor, scale: float) -> AttentionInputs:
    """Returns the queries that read a block, with the block's keys and values, in the shapes of
    `attention_matmul`."""
    keys, values = (tensor[block.begin : block.end].transpose(0, 1) for tensor in (k, v))
    return AttentionInputs(_grouped(q[block.first : block.last], k.shape[1]), keys, values, scale)


def _merge(out: Tensor, log_sums: Tensor, block_out: Tensor, block_log_sums: Tensor) -> None:
    """Merges a block's attention into `out` and `log_sums` in place."""
    total = torch.logaddexp(log_sums, block_log_sums)
    old, new = (log_sums - total).exp_()[..., None], (block_log_sums - total).exp_()[..., None]
    out.copy_(out * old + block_out * new)
    log_sums.copy_(total)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = query.shape
    sums_dtype = attention_matmul.accumulation_dtype(query)
    return query.new_empty(batch, length, heads, size), query.new_empty(length, heads, dtype=sums_dtype)


@attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        tensor.new_empty(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3]).transpose(1, 2)
        for tensor in (query, key, value)
    )


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    query, key, value, out, log_sums = ctx.saved_tensors
    return *attend_backward(gradient, query, key, value, out, log_sums, ctx.scale), None


attend.register_autograd(_backward, setup_context=_save_for_backward)
