"""Defines how much memory the kernels use at a time.

This module doesn't import torch, so that the memory estimate can read the same numbers as
`chunked_cross_entropy` and attention.
"""

from __future__ import annotations

CHUNK_BYTES = {"cpu": 25 * 2**20, "cuda": 2**28}
"""Bytes of logits that are computed at a time, in the number format of the matrix products: enough
to keep the products efficient. On a GPU, the rows of a chunk must be worth reading the whole output
matrix: with a vocabulary of 128,256, a chunk in bfloat16 has 1,024 rows."""

UNFUSED_CHUNK_BYTES = {"cpu": 25 * 2**20, "cuda": 2**27}
"""The same if the softmax needs memory besides the logits, because no kernel computes it in
place."""

SOFTMAX_BYTES = {"cpu": 2**22, "cuda": 2**26}
"""Bytes of float32 logits whose softmax is computed at a time, unless one kernel computes it in
place."""

PER_TOKEN_BYTES = {"cpu": 25 * 2**20, "cuda": 2**27}
"""Bytes of float32 logits that are computed at a time if the loss of each token is needed. Their
backward pass needs several times as much."""

ATTENTION_SCORES = 2**24
"""How many scores `attention.chunked` computes at a time, in float32."""

GATHERED_KEYS = 2
"""How many keys a call of the flash kernel gathers at most, in multiples of the row's tokens."""

_MAX_HEAD_SIZE, _HEAD_SIZE_MULTIPLE = 256, 8


def supports_head_size(size: int) -> bool:
    """Returns whether the flash kernel computes heads of this size."""
    return size <= _MAX_HEAD_SIZE and size % _HEAD_SIZE_MULTIPLE == 0
