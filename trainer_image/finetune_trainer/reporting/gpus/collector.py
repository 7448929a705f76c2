"""Turns what NVML reports into series for Prometheus when it scrapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_trainer.reporting.gpus.nvml import Reading
from finetune_trainer.reporting.gpus.watch import Observation

_FIGURES = (
    ("finetune_gpu_utilization_ratio", "Share of time in which a kernel ran, 0 to 1; absent with MIG.",
     "utilization_ratio"),
    ("finetune_gpu_memory_used_bytes", "Memory in use, of the MIG slice if there is one.", "memory_used_bytes"),
    ("finetune_gpu_memory_total_bytes", "Total memory, of the MIG slice if there is one.", "memory_total_bytes"),
    ("finetune_gpu_power_watts", "Power draw.", "power_watts"),
    ("finetune_gpu_temperature_celsius", "Temperature of the GPU's core.", "temperature_celsius"),
    ("finetune_gpu_sm_clock_hertz", "Clock of the streaming multiprocessors.", "sm_clock_hertz"),
)  # fmt: skip


class ObservedGpus(Protocol):
    """Where observations of GPUs come from."""

    def observe(self) -> Observation: ...


class GpuCollector(Collector):
    """Observes the GPUs when Prometheus scrapes. Every series has the labels `gpu`, the index in
    this pod, and `uuid`, by which it can be joined with the series of DCGM."""

    def __init__(self, gpus: ObservedGpus, labels: Mapping[str, str]) -> None:
        self._gpus = gpus
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        """Yields one family for each value that a GPU reports."""
        observation = self._gpus.observe()
        for family in (*self._figures(observation), *self._by_kind(observation), self._xids(observation)):
            if family.samples:
                yield family

    def _figures(self, observation: Observation) -> Iterator[GaugeMetricFamily]:
        for name, text, attribute in _FIGURES:
            family = self._gauge(name, text)
            for reading in observation.readings:
                value = getattr(reading, attribute)
                if value is not None:
                    family.add_metric(self._values(reading), value)
            yield family
        lost = self._gauge(
            "finetune_gpu_lost", "1 if the GPU can't be used any more: lost, in need of a reset, or without its driver."
        )
        for reading in observation.readings:
            lost.add_metric(self._values(reading), float(bool(reading.failure)))
        yield lost

    def _by_kind(self, observation: Observation) -> Iterator[Metric]:
        throttled = self._gauge("finetune_gpu_throttled", "1 if the clock is lowered for this reason.", "reason")
        pcie = self._gauge("finetune_gpu_pcie_bytes_per_second", "PCIe traffic, over 20 ms.", "direction")
        rows = self._gauge(
            "finetune_gpu_remapped_rows",
            "Memory rows that were replaced, by cause; 1 for pending and failed if that is so.",
            "cause",
        )
        nvlink = self._counter("finetune_gpu_nvlink_bytes", "NVLink traffic of all links.", "direction")
        ecc = self._counter("finetune_gpu_ecc_errors", "ECC errors since the driver was loaded.", "kind")
        for reading in observation.readings:
            for family, values in (
                (throttled, reading.throttled),
                (pcie, reading.pcie),
                (rows, reading.remapped_rows),
                (nvlink, reading.nvlink),
                (ecc, reading.ecc_errors),
            ):
                for kind, value in (values or {}).items():
                    family.add_metric([*self._values(reading), kind], float(value))
        yield from (throttled, pcie, rows, nvlink, ecc)

    def _xids(self, observation: Observation) -> CounterMetricFamily:
        family = self._counter("finetune_gpu_xid_errors", "Xid errors of the driver since the pod started.", "xid")
        by_index = {reading.device.index: reading for reading in observation.readings}
        for (index, xid), count in observation.xids.items():
            if index in by_index:
                family.add_metric([*self._values(by_index[index]), str(xid)], count)
        return family

    def _values(self, reading: Reading) -> list[str]:
        return [*self._labels.values(), str(reading.device.index), reading.device.uuid]

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, text, labels=(*self._labels, "gpu", "uuid", *labels))

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(name, text, labels=(*self._labels, "gpu", "uuid", *labels))
