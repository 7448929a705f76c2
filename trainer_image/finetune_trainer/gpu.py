"""GPU utilisation and memory, by NVML through nvidia-ml-py. Used by metrics and progress.

Without a GPU, its driver or its library there are no samples: series are absent then, not zero. Never raises.
"""

from __future__ import annotations

import contextlib
import threading

import pynvml

from finetune_api.progress import GpuSample


class Gpus:
    """The GPUs that this pod sees. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: tuple[object, ...] = ()
        try:
            pynvml.nvmlInit()
            self._handles = tuple(pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount()))
        except (pynvml.NVMLError, OSError):
            self._handles = ()

    def sample(self) -> tuple[GpuSample, ...]:
        """Now. What a GPU doesn't tell is left out."""
        with self._lock:
            return tuple(_sample(index, handle) for index, handle in enumerate(self._handles))


def _sample(index: int, handle: object) -> GpuSample:
    utilization = used = total = None
    with contextlib.suppress(pynvml.NVMLError):
        utilization = min(1.0, pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        used, total = int(memory.used), int(memory.total)
    return GpuSample(index=index, utilization_ratio=utilization, memory_used_bytes=used, memory_total_bytes=total)
