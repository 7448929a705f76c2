"""Watches the GPUs of a pod from a thread, which reads NVML every 10 seconds and when it is asked.

Nobody else calls NVML: a driver that hangs then blocks this thread only, and neither the supervisor
nor a scrape.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from finetune_api.messages.progress import GpuSample
from finetune_trainer.log import Log
from finetune_trainer.reporting.gpus import nvml, xids

INTERVAL = 10.0  # seconds
_SAMPLE_TIMEOUT = 2.0  # seconds that a scrape or a post waits for a fresh reading
_FAULTS_TIMEOUT = 5.0


@dataclass(frozen=True)
class Observation:
    """What is known of the GPUs at one time.

    `faults` are clauses about what failed since the watch began; `xids` counts the errors by
    (index of the GPU, number). `ecc_errors` of the readings are those since the driver was loaded.
    """

    readings: tuple[nvml.Reading, ...] = ()
    faults: tuple[str, ...] = ()
    xids: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def samples(self) -> tuple[GpuSample, ...]:
        """The figures that are posted to the operator."""
        return tuple(
            GpuSample(
                index=reading.device.index,
                uuid=reading.device.uuid or None,
                utilization_ratio=reading.utilization_ratio,
                memory_used_bytes=reading.memory_used_bytes,
                memory_total_bytes=reading.memory_total_bytes,
            )
            for reading in self.readings
        )


class Gpus:
    """Observes the GPUs that are visible to this pod. It is thread-safe and never raises."""

    def __init__(self, log: Log | None = None) -> None:
        self._log = log
        self._devices = nvml.devices()
        self._events = nvml.XidEvents(self._devices)
        self._xids: Counter[tuple[int, int]] = Counter()
        self._first = tuple(nvml.read(device) for device in self._devices)
        self._changed = threading.Condition()
        self._requested = 0  # readings that somebody asked for …
        self._finished = 0  # … and those that are done
        self._latest = Observation()
        if self._devices:
            threading.Thread(target=self._watch, name="gpus", daemon=True).start()

    def observe(self, timeout: float = _SAMPLE_TIMEOUT) -> Observation:
        """Returns a fresh observation; the last one if NVML doesn't answer within `timeout`
        seconds."""
        if not self._devices:
            return self._latest
        with self._changed:
            self._requested += 1
            target = self._requested
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._finished >= target, timeout)
            return self._latest

    def sample(self) -> tuple[GpuSample, ...]:
        """Returns the current values of each GPU; a value that a GPU doesn't report is None."""
        return self.observe().samples

    def faults(self) -> tuple[str, ...]:
        """Returns a clause for each fault of a GPU since the start: an Xid error of the hardware,
        memory errors that couldn't be corrected, or a GPU that can't be used any more."""
        return self.observe(_FAULTS_TIMEOUT).faults

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requested > self._finished, INTERVAL)
                target = self._requested
            observation = self._read()
            with self._changed:
                before, self._latest, self._finished = self._latest, observation, target
                self._changed.notify_all()
            self._log_new(before, observation)

    def _read(self) -> Observation:
        self._xids.update(self._events.new())
        readings = tuple(nvml.read(device) for device in self._devices)
        clauses = [
            f"{self._name(index)} reported {xids.description(xid)}"
            for index, xid in self._xids
            if xids.origin(xid) == "hardware"
        ]
        for first, reading in zip(self._first, readings, strict=True):
            clauses += _new_faults(first, reading)
        return Observation(readings, self._with_earlier(clauses), dict(self._xids))

    def _with_earlier(self, clauses: list[str]) -> tuple[str, ...]:
        """Returns the clauses after those of the last observation. A GPU that is lost no longer
        reports its errors."""
        return tuple(dict.fromkeys((*self._latest.faults, *clauses)))

    def _name(self, index: int) -> str:
        return self._devices[index].name if index >= 0 else "a GPU"

    def _log_new(self, before: Observation, after: Observation) -> None:
        """Logs each fault and each Xid error of a program once, when it is first observed."""
        if self._log is None:
            return
        for clause in after.faults:
            if clause not in before.faults:
                self._log.warning("a GPU failed", detail=clause)
        for index, xid in after.xids:
            if (index, xid) not in before.xids and xids.origin(xid) == "application":
                self._log.warning("a GPU reported an error of a program", gpu=self._name(index), xid=xid)


def _new_faults(first: nvml.Reading, now: nvml.Reading) -> list[str]:
    """Returns a clause for each fault of a GPU that it didn't have in its first reading."""
    name, clauses = now.device.name, []
    if now.ecc_errors.get("uncorrected", 0) > first.ecc_errors.get("uncorrected", 0):
        clauses.append(f"{name} had memory errors that ECC couldn't correct")
    if (now.remapped_rows or {}).get("failed") and not (first.remapped_rows or {}).get("failed"):
        clauses.append(f"{name} has a defective memory row that can't be replaced")
    if now.failure:
        clauses.append(f"{name} {now.failure}")
    return clauses
