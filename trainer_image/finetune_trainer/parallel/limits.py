"""Defines how much the strategies send or gather at a time.

This module doesn't import torch, so that the memory estimate can read the same numbers as the code
that allocates the buffers.
"""

from __future__ import annotations

GRADIENT_BUCKET = 16 * 2**20
"""The number of gradient values, in float32, that `ddp` averages in one message."""

ZERO_BUCKET = 5 * 10**7
"""The number of values that DeepSpeed reduces or gathers in one message."""

ZERO_LIVE_PARAMETERS = 10**9
"""The number of weights that stage 3 of DeepSpeed may keep gathered: its default for
stage3_max_live_parameters."""
