"""Reads the GPUs of a pod by NVML, through nvidia-ml-py. It never raises.

Without a GPU, its driver or its library there are no devices, so metrics are absent rather than
zero; what a GPU doesn't support is None. A call can block for as long as the driver hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pynvml

# Bits of nvmlClocksEventReasons that lower the clock, other than idleness and settings.
_THROTTLE_REASONS = {
    "power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "hardware_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
    "software_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hardware_thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}
# What NVML answers about a GPU that can't be used any more, whatever is asked.
_FAILURES = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "is lost",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "is gone",
    pynvml.NVML_ERROR_RESET_REQUIRED: "needs a reset",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "has lost its driver, which is no longer loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "has another driver than when the pod started",
}
_ALL_LINKS = 0xFFFFFFFF  # the scope of a field value that sums over a GPU's links


@dataclass(frozen=True)
class Device:
    """A GPU or MIG slice that the pod sees.

    `index` counts them, `uuid` is that of the GPU, also for a slice. `gpu` is the handle of the
    GPU, `part` that of the slice, or of the GPU if it isn't sliced. Both are None for a GPU that
    was lost before this process started.
    """

    index: int
    uuid: str
    slice_uuid: str = ""
    gpu: object | None = None
    part: object | None = None

    @property
    def name(self) -> str:
        """The name in a message, such as `GPU 1 (GPU-5e…)`."""
        uuid = (self.slice_uuid and f"{self.slice_uuid} of {self.uuid}") or self.uuid
        return f"GPU {self.index} ({uuid})" if uuid else f"GPU {self.index}"


@dataclass(frozen=True)
class Reading:
    """The figures of one device at one time; None is what it doesn't support.

    `throttled` maps each reason for a lower clock to whether it applies. `pcie` and `nvlink` are by
    direction (tx, rx): bytes per second, and bytes since the driver was loaded. `ecc_errors` are
    those since the driver was loaded, by kind (corrected, uncorrected), `remapped_rows` by cause.
    `failure` says, as a predicate, why the GPU can't be used any more; empty if it can.
    """

    device: Device
    utilization_ratio: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    sm_clock_hertz: float | None = None
    throttled: dict[str, bool] | None = None
    pcie: dict[str, float] = field(default_factory=dict)
    nvlink: dict[str, float] = field(default_factory=dict)
    ecc_errors: dict[str, int] = field(default_factory=dict)
    remapped_rows: dict[str, int] | None = None
    failure: str = ""


def devices() -> tuple[Device, ...]:
    """Returns the devices that the pod sees, after initializing NVML. Empty without a driver."""
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except (pynvml.NVMLError, OSError):
        return ()
    parts: list[tuple[object | None, object | None]] = []
    for index in range(count):
        gpu = _value(pynvml.nvmlDeviceGetHandleByIndex, index)
        parts += [(gpu, part) for part in _slices(gpu) or (gpu,)]
    return tuple(_device(index, gpu, part) for index, (gpu, part) in enumerate(parts))


def read(device: Device) -> Reading:
    """Returns the current figures of a device."""
    gpu, part = device.gpu, device.part
    if gpu is None:
        return Reading(device, failure=_FAILURES[pynvml.NVML_ERROR_GPU_IS_LOST])
    utilization = _value(pynvml.nvmlDeviceGetUtilizationRates, part)
    memory = _value(pynvml.nvmlDeviceGetMemoryInfo, part)
    power = _value(pynvml.nvmlDeviceGetPowerUsage, gpu)
    clock = _value(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM)
    temperature = _value(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU)
    return Reading(
        device,
        utilization_ratio=None if utilization is None else min(1.0, utilization.gpu / 100),
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_total_bytes=None if memory is None else int(memory.total),
        power_watts=None if power is None else power / 1000,
        temperature_celsius=None if temperature is None else float(temperature),
        sm_clock_hertz=None if clock is None else clock * 1e6,
        throttled=_throttled(gpu),
        pcie=_pcie(gpu),
        nvlink=_nvlink(gpu),
        ecc_errors=_ecc_errors(gpu),
        remapped_rows=_remapped_rows(gpu),
        failure=_failure(gpu),
    )


class XidEvents:
    """The Xid errors of some devices, from its creation on."""

    def __init__(self, watched: tuple[Device, ...]) -> None:
        self._indexes = {_address(device.gpu): device.index for device in watched if device.gpu is not None}
        self._set = _value(pynvml.nvmlEventSetCreate) if self._indexes else None
        gpus = {_address(device.gpu): device.gpu for device in watched if device.gpu is not None}
        for gpu in gpus.values() if self._set is not None else ():
            with contextlib.suppress(pynvml.NVMLError):  # some virtual GPUs have no events
                pynvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeXidCriticalError, self._set)

    def new(self) -> list[tuple[int, int]]:
        """Returns (index of the device, Xid) for each error since the last call, without waiting.

        An error of a GPU with several slices is attributed to the last one in this pod.
        """
        errors = []
        with contextlib.suppress(pynvml.NVMLError):  # no more events, or none at all
            while self._set is not None:
                event = pynvml.nvmlEventSetWait_v2(self._set, 0)
                errors.append((self._indexes.get(_address(event.device), -1), int(event.eventData)))
        return errors


def _device(index: int, gpu: object | None, part: object | None) -> Device:
    uuid = _value(pynvml.nvmlDeviceGetUUID, gpu) if gpu is not None else ""
    slice_uuid = _value(pynvml.nvmlDeviceGetUUID, part) if part is not gpu else ""
    return Device(index, uuid or "", slice_uuid or "", gpu, part)


def _slices(gpu: object | None) -> list[object]:
    """Returns the handles of a GPU's MIG slices; empty without MIG."""
    mode = _value(pynvml.nvmlDeviceGetMigMode, gpu) if gpu is not None else None
    if not mode or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return []
    count = _value(pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0
    handles = (_value(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, number) for number in range(count))
    return [handle for handle in handles if handle is not None]


def _throttled(gpu: object) -> dict[str, bool] | None:
    bits = _value(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu)
    if bits is None:  # drivers before branch 535 know the function by its old name
        bits = _value(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu)
    return None if bits is None else {reason: bool(bits & bit) for reason, bit in _THROTTLE_REASONS.items()}


def _pcie(gpu: object) -> dict[str, float]:
    """Returns bytes per second, which NVML averages over 20 ms."""
    counters = {"tx": pynvml.NVML_PCIE_UTIL_TX_BYTES, "rx": pynvml.NVML_PCIE_UTIL_RX_BYTES}
    kilobytes = {
        direction: _value(pynvml.nvmlDeviceGetPcieThroughput, gpu, which) for direction, which in counters.items()
    }
    return {direction: value * 1000.0 for direction, value in kilobytes.items() if value is not None}


def _nvlink(gpu: object) -> dict[str, float]:
    fields = {
        "tx": (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _ALL_LINKS),
        "rx": (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, _ALL_LINKS),
    }
    values = _value(pynvml.nvmlDeviceGetFieldValues, gpu, list(fields.values())) or ()
    return {
        direction: value.value.ullVal * 1024.0
        for direction, value in zip(fields, values, strict=False)
        if value.nvmlReturn == pynvml.NVML_SUCCESS
    }


def _ecc_errors(gpu: object) -> dict[str, int]:
    """Returns the errors since the driver was loaded; empty for a GPU without ECC."""
    kinds = {
        "corrected": pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        "uncorrected": pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    }
    counts = {
        name: _value(pynvml.nvmlDeviceGetTotalEccErrors, gpu, kind, pynvml.NVML_VOLATILE_ECC)
        for name, kind in kinds.items()
    }
    return {name: int(count) for name, count in counts.items() if count is not None}


def _remapped_rows(gpu: object) -> dict[str, int] | None:
    rows = _value(pynvml.nvmlDeviceGetRemappedRows, gpu)
    return None if rows is None else dict(zip(("correctable", "uncorrectable", "pending", "failed"), rows, strict=True))


def _failure(gpu: object) -> str:
    try:
        pynvml.nvmlDeviceGetMemoryInfo(gpu)
    except pynvml.NVMLError as error:
        return _FAILURES.get(error.value, "")
    return ""


def _value(function: Callable[..., Any], *arguments: object) -> Any:
    """Returns NVML's answer; None if the GPU, or a driver that is older than the function, has
    none."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _address(handle: object) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value  # type: ignore[arg-type]
