"""Measures how much memory is free on the device that a rank computes on."""

from __future__ import annotations

import torch

from finetune_trainer import host_memory


def free_bytes(device: torch.device, ranks: int) -> int:
    """Returns the free bytes of a GPU, or one rank's share of the container's free memory if
    `ranks` ranks share it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory.free_bytes(ranks)
