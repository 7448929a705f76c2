"""Defines the inputs of one attention computation, as the kernels pass them on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Holds query, key and value, and the scaling factor of the scores.

    Each kernel documents the shapes that it needs. Keys and values may have fewer heads than
    queries (grouped-query attention, Ainslie et al. 2023).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
