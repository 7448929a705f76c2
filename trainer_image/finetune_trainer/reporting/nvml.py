"""Reads utilization, memory and faults of GPUs by NVML, through nvidia-ml-py. It never raises.

Without a GPU, its driver or its library there are no samples, so metrics are absent rather than
zero.
"""

from __future__ import annotations

import contextlib
import threading

import pynvml

from finetune_api.messages.progress import GpuSample

# Xid errors that a program causes itself: those after which NVIDIA's device plugin for Kubernetes
# doesn't consider a GPU unhealthy either.
_XIDS_OF_PROGRAMS = frozenset({13, 31, 43, 45, 68, 109})


class Gpus:
    """Samples the GPUs that are visible to this pod. It is thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: tuple[object, ...] = ()
        self._events: object | None = None  # the Xid errors since the start
        self._faults: tuple[str, ...] = ()
        try:
            pynvml.nvmlInit()
            self._handles = tuple(pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount()))
        except (pynvml.NVMLError, OSError):
            self._handles = ()
        self._ecc_errors = tuple(_ecc_errors(handle) for handle in self._handles)
        with contextlib.suppress(pynvml.NVMLError):
            self._events = pynvml.nvmlEventSetCreate() if self._handles else None
        for handle in self._handles if self._events is not None else ():
            with contextlib.suppress(pynvml.NVMLError):  # some virtual GPUs have no events
                pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, self._events)

    def faults(self) -> tuple[str, ...]:
        """Returns a clause for each fault of a GPU since the start: a fatal Xid error, memory
        errors that couldn't be corrected, or a GPU that is lost."""
        with self._lock:
            clauses = [*self._faults, *self._new_xids()]
            for index, handle in enumerate(self._handles):
                name = _name(index, handle)
                errors = _ecc_errors(handle) - self._ecc_errors[index]
                if errors > 0:
                    clauses.append(f"{name} had {errors} memory errors that ECC couldn't correct")
                if _is_lost(handle):
                    clauses.append(f"{name} is lost")
            self._faults = tuple(dict.fromkeys(clauses))
            return self._faults

    def _new_xids(self) -> list[str]:
        clauses = []
        with contextlib.suppress(pynvml.NVMLError):  # no more events, or none at all
            while self._events is not None:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
                if event.eventData not in _XIDS_OF_PROGRAMS:
                    clauses.append(f"{self._name_of(event.device)} reported Xid {event.eventData}")
        return clauses

    def _name_of(self, device: object) -> str:
        uuids = [_uuid(handle) for handle in self._handles]
        uuid = _uuid(device)
        return _name(uuids.index(uuid), device) if uuid in uuids else f"GPU {uuid}"

    def sample(self) -> tuple[GpuSample, ...]:
        """Returns the current values of each GPU; a value that a GPU doesn't report is None."""
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


def _name(index: int, handle: object) -> str:
    uuid = _uuid(handle)
    return f"GPU {index} ({uuid})" if uuid else f"GPU {index}"


def _uuid(handle: object) -> str:
    with contextlib.suppress(pynvml.NVMLError):
        return str(pynvml.nvmlDeviceGetUUID(handle))
    return ""


def _ecc_errors(handle: object) -> int:
    """Returns the uncorrected errors since the driver was loaded; 0 for a GPU without ECC."""
    kind, counter = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    with contextlib.suppress(pynvml.NVMLError):
        return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter))
    return 0


def _is_lost(handle: object) -> bool:
    try:
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        return bool(error.value == pynvml.NVML_ERROR_GPU_IS_LOST)
    return False
