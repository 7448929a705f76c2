"""Sends the indices of a micro-batch to its device, without letting the host wait for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(array: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an array as a tensor on `device`, in its own number format or in `dtype`.

    A copy from ordinary memory would make the host wait until the GPU has computed everything
    before it. From page-locked memory, it joins the GPU's queue.
    """
    tensor = torch.as_tensor(array, dtype=dtype)
    if device.type != "cuda" or tensor.numel() == 0:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
