"""The clocks of a step. A fake of a GPU's queue is as strict as CUDA: events that it hasn't reached
can't be compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from finetune_trainer.training.steps import step_clock
from finetune_trainer.training.steps.step_clock import CudaClock, HostClock


@dataclass
class FakeGpu:
    """Stands for the queue of a GPU: work of some milliseconds and events, which are reached when
    `reach` is called."""

    queued: float = 0.0
    reached: float = -1.0

    def compute(self, milliseconds: float) -> None:
        self.queued += milliseconds

    def reach(self) -> None:
        self.reached = self.queued

    def event(self) -> FakeEvent:
        return FakeEvent(self)


@dataclass
class FakeEvent:
    """Stands for torch.cuda.Event with timing."""

    gpu: FakeGpu
    times: list[float] = field(default_factory=list)

    def record(self) -> None:
        assert not self.times, "an event that is recorded again loses its first time"
        self.times.append(self.gpu.queued)

    def query(self) -> bool:
        return bool(self.times) and self.times[0] <= self.gpu.reached

    def elapsed_time(self, end_event: Any) -> float:
        if not self.times or not end_event.times:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not self.query() or not end_event.query():
            raise RuntimeError("CUDA error: device not ready")
        return float(end_event.times[0] - self.times[0])


def _step(clock: CudaClock, gpu: FakeGpu, optimizer: float) -> dict[str, float]:
    clock.start()
    for _ in range(2):
        clock.lap("data")
        gpu.compute(30)
        clock.lap("forward")
        gpu.compute(60)
        clock.lap("backward")
    gpu.reach()  # the losses are read
    gpu.compute(optimizer)
    clock.lap("optimizer")
    return clock.seconds()


def test_parts_are_what_the_gpu_computes_and_the_optimizer_is_read_a_step_later() -> None:
    gpu = FakeGpu()
    clock = CudaClock(gpu.event)
    first, second, third = (_step(clock, gpu, optimizer) for optimizer in (5.0, 7.0, 9.0))
    assert first.pop("total") >= 0
    assert first == pytest.approx({"data": 0.0, "forward": 0.06, "backward": 0.12})
    assert second["optimizer"] == pytest.approx(0.005)
    assert third["optimizer"] == pytest.approx(0.007)
    assert third["backward"] == pytest.approx(0.12)


def test_a_step_that_is_computed_again_counts_once() -> None:
    gpu = FakeGpu()
    clock = CudaClock(gpu.event)
    clock.start()
    gpu.compute(1000)
    clock.lap("forward")
    assert _step(clock, gpu, 5.0)["forward"] == pytest.approx(0.06)


def test_the_host_measures_its_own_time() -> None:
    clock = step_clock.of_device(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    clock.lap("data")
    clock.lap("forward")
    seconds = clock.seconds()
    assert list(seconds) == ["data", "forward", "total"]
    assert seconds["data"] + seconds["forward"] <= seconds["total"]
    clock.start()
    assert list(clock.seconds()) == ["total"]
