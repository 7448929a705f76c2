"""Timing of a Hugging Face Trainer's micro-batches. Imported by `run_*.py` inside a peer's environment; no own package.

A window begins when a micro-batch after the warm-up ends, and ends with a later one: whole micro-batches and the
optimizer steps between them, wall time, nothing subtracted. Tokens are counted from the batches that the trainer
itself made.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Enough(Exception):
    """The window is full."""


@dataclass(frozen=True)
class Window:
    """`warm_up` and `seconds` are wall time; at least `least` micro-batches warm up, and as many are measured."""

    warm_up: float
    seconds: float
    accumulation: int
    least: int = 2


@dataclass
class Recorder:
    """Call `done` after every micro-batch; it raises Enough."""

    window: Window
    ends: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    first: int | None = None  # index of the micro-batch whose end opens the window

    def counted(self, inputs: dict[str, Any]) -> None:
        """Call it before the trainer takes the batch apart."""
        positions = int(inputs["input_ids"].numel())
        lengths = _lengths(inputs)
        self.positions.append(positions)
        self.tokens.append(int(sum(lengths)))
        self.labels.append(int((inputs["labels"] != -100).sum()))
        self.pairs.append(sum(n * (n + 1) / 2 for n in lengths))

    def done(self) -> None:
        now = time.perf_counter()
        self.ends.append(now)
        index = len(self.ends) - 1
        if self.first is None:
            if index + 1 >= self.window.least and now - self.began >= self.window.warm_up:
                self.first = index
            return
        elapsed = now - self.ends[self.first]
        whole_step = (index + 1) % self.window.accumulation == 0
        if index - self.first >= self.window.least and (elapsed >= 1.5 * self.window.seconds or (
            elapsed >= self.window.seconds and whole_step
        )):  # fmt: skip
            raise Enough

    def result(self) -> dict[str, Any]:
        """Sums over the window. Raises ValueError where the data ended before it was full enough."""
        if self.first is None or len(self.ends) - self.first <= self.window.least:
            raise ValueError(f"{len(self.ends)} micro-batches were too few for a measurement")
        window = slice(self.first + 1, len(self.ends))
        return {
            "seconds": self.ends[-1] - self.ends[self.first],
            "micro_batches": len(self.ends) - self.first - 1,
            "steps": (len(self.ends) - self.first - 1) / self.window.accumulation,
            "tokens": sum(self.tokens[window]),
            "positions": sum(self.positions[window]),
            "labels": sum(self.labels[window]),
            "pairs": sum(self.pairs[window]),
            "thirds": _thirds(self.tokens[window], self.ends[self.first :]),
        }


def _lengths(inputs: dict[str, Any]) -> list[int]:
    """Of the documents in a batch."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and int(mask.max()) <= 1:
        return [int(n) for n in mask.sum(dim=1).tolist()]
    if mask is not None and mask.dim() == 2:  # documents of a packed row are numbered 1, 2, … (padding 0)
        return [int(n) for row in mask for n in row[row > 0].unique(return_counts=True)[1].tolist()]
    positions = inputs["position_ids"]
    starts = (positions.flatten() == 0).nonzero().flatten().tolist()
    return [b - a for a, b in zip(starts, [*starts[1:], positions.numel()], strict=True)]


def _thirds(tokens: list[int], ends: list[float]) -> list[float]:
    """Tokens a second in the first, second and last part of the window: how stable the figure is."""
    count = len(tokens)
    borders = sorted({0, count // 3, 2 * count // 3, count})
    return [sum(tokens[a:b]) / (ends[b] - ends[a]) for a, b in itertools.pairwise(borders)]


def peak_rss() -> int:
    """Bytes: the high-water mark of this process."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _gpu_peak() -> int | None:
    """Bytes that tensors took on the GPU at most; None without one."""
    torch = sys.modules["torch"]
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


def answer_all(
    request: dict[str, Any], file: str, measure: Callable[[dict[str, Any]], dict[str, Any]], versions: dict[str, str]
) -> None:
    """One JSON line a configuration, errors too. Of a family the larger ones are left out once speed falls by a tenth.

    A configuration that asks for more than the memory there is gets an error from the allocator, and the machine's
    other processes live.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (request["memory"], resource.RLIM_INFINITY))
    best: dict[str, float] = {}
    fallen: set[str] = set()
    for config in request["configs"]:
        began, family = time.perf_counter(), config.get("family", "")
        if family and family in fallen:
            answer: dict[str, Any] = {"skipped": "smaller ones of its family were faster already"}
        else:
            try:
                answer = measure(config)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-1500:]}
        if "seconds" in answer:
            rate = answer["tokens"] / answer["seconds"]
            best[family] = max(rate, best.get(family, 0.0))
            if rate < 0.9 * best[family]:
                fallen.add(family)
        elif "error" in answer:
            fallen.add(family)
        answer |= {
            "name": config["name"],
            "wall_seconds": time.perf_counter() - began,
            "peak_rss_bytes": peak_rss(),
            "gpu_peak_bytes": _gpu_peak(),
            "versions": versions,
        }
        with open(file, "a") as out:
            out.write(json.dumps(answer) + "\n")
