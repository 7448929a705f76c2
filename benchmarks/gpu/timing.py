"""Measures the time and memory of work on a device, and the distance between tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def seconds(work: Callable[[], object], device: str, *, budget: float = 0.4, least: int = 3) -> float:
    """Returns the median seconds of several runs, after two warm-up runs.

    It measures for about `budget` seconds, but at least `least` runs.
    """
    for _ in range(2):
        work()
    synchronize(device)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < least or (time.perf_counter() < end and len(times) < 100):
        times.append(_once(work, device))
    return statistics.median(times)


def _once(work: Callable[[], object], device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def synchronize(device: str) -> None:
    """Waits for the GPU, if the device is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Returns the peak of memory that the work adds, in bytes; 0 if the device isn't a GPU."""
    if device != "cuda":
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def distance(value: Tensor, exact: Tensor) -> float:
    """Returns the norm of the difference, divided by the norm of `exact`."""
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def rate(value: float, unit: str) -> str:
    """Formats a rate for people: 12.3 TFLOP/s, 456 GB/s."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}"
