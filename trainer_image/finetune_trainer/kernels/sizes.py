"""Defines how much memory the loss of the output head uses at a time.

This module doesn't import torch, so that the memory estimate can read the same numbers as
`chunked_cross_entropy`.
"""

from __future__ import annotations

CHUNK_BYTES = {"cpu": 25 * 2**20, "cuda": 2**25}
"""Bytes of logits that are computed at a time, in the number format of the matrix products: enough
to keep the products efficient."""

SOFTMAX_BYTES = {"cpu": 2**22, "cuda": 2**26}
"""Bytes of float32 logits whose softmax is computed at a time."""
