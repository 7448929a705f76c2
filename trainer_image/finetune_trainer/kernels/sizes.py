"""Defines how much memory the loss of the output head uses at a time.

This module doesn't import torch, so that the memory estimate can read the same numbers as
`chunked_cross_entropy`.
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
