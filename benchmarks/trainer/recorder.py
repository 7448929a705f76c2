"""Times the micro-batches of a Hugging Face Trainer.

It runs in a peer's environment, so it imports no other module of this project. A measurement's
window begins when a micro-batch after the warm-up ends, and ends with a later one. It has complete
micro-batches and the optimizer steps between them, in wall time, with nothing subtracted. Tokens
are counted in the batches that the trainer itself made.
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
    """Raised to end the training: the window is complete."""


@dataclass(frozen=True)
class Window:
    """A measurement's warm-up and length, in seconds of wall time.

    Warm-up and measurement each have at least `least` micro-batches.
    """

    warm_up: float
    seconds: float
    accumulation: int
    least: int = 2


@dataclass
class Recorder:
    """Records micro-batches: call `counted` before each and `done` after it."""

    window: Window
    ends: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    first: int | None = None  # index of the micro-batch whose end opens the window

    def counted(self, inputs: dict[str, Any]) -> None:
        """Counts a batch's tokens; call it before the trainer removes fields from the batch."""
        positions = int(inputs["input_ids"].numel())
        lengths = _lengths(inputs)
        self.positions.append(positions)
        self.tokens.append(int(sum(lengths)))
        self.labels.append(int((inputs["labels"] != -100).sum()))
        self.pairs.append(sum(n * (n + 1) / 2 for n in lengths))

    def done(self) -> None:
        """Records the end of a micro-batch. Raises Enough if the window is complete."""
        now = time.perf_counter()
        self.ends.append(now)
        index = len(self.ends) - 1
        if self.first is None:
            if index + 1 >= self.window.least and now - self.began >= self.window.warm_up:
                self.first = index
            return
        elapsed = now - self.ends[self.first]
        is_step_end = (index + 1) % self.window.accumulation == 0
        if index - self.first >= self.window.least and (elapsed >= 1.5 * self.window.seconds or (
            elapsed >= self.window.seconds and is_step_end
        )):  # fmt: skip
            raise Enough

    def result(self) -> dict[str, Any]:
        """Returns the sums over the window. Raises ValueError if it has too few micro-batches."""
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
    """Returns the lengths of the documents in a batch."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and int(mask.max()) <= 1:
        return [int(n) for n in mask.sum(dim=1).tolist()]
    if mask is not None and mask.dim() == 2:  # documents of a packed row are numbered 1, 2, … (padding 0)
        return [int(n) for row in mask for n in row[row > 0].unique(return_counts=True)[1].tolist()]
    positions = inputs["position_ids"]
    starts = (positions.flatten() == 0).nonzero().flatten().tolist()
    return [b - a for a, b in zip(starts, [*starts[1:], positions.numel()], strict=True)]


def _thirds(tokens: list[int], ends: list[float]) -> list[float]:
    """Returns the tokens per second in each third of the window, which show its stability."""
    count = len(tokens)
    borders = sorted({0, count // 3, 2 * count // 3, count})
    return [sum(tokens[a:b]) / (ends[b] - ends[a]) for a, b in itertools.pairwise(borders)]


def peak_rss() -> int:
    """Returns the peak resident memory of this process in bytes; 0 if it is unknown."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _gpu_peak() -> int | None:
    """Returns the peak bytes of tensors on the GPU; None without a GPU."""
    torch = sys.modules["torch"]
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


def answer_all(
    request: dict[str, Any], file: str, measure: Callable[[dict[str, Any]], dict[str, Any]], versions: dict[str, str]
) -> None:
    """Appends one JSON line per configuration to `file`, with its measurement or error.

    Once the speed within a family of configurations falls by a tenth, the larger ones are skipped.
    A limit on memory makes a configuration that needs too much fail with an error of the allocator,
    so that the kernel doesn't kill other processes.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (request["memory"], resource.RLIM_INFINITY))
    best: dict[str, float] = {}
    ended_families: set[str] = set()
    for config in request["configs"]:
        began, family = time.perf_counter(), config.get("family", "")
        if family and family in ended_families:
            answer: dict[str, Any] = {"skipped": "smaller ones of its family were faster"}
        else:
            try:
                answer = measure(config)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-1500:]}
        if "seconds" in answer:
            rate = answer["tokens"] / answer["seconds"]
            best[family] = max(rate, best.get(family, 0.0))
            if rate < 0.9 * best[family]:
                ended_families.add(family)
        elif "error" in answer:
            ended_families.add(family)
        answer |= {
            "name": config["name"],
            "wall_seconds": time.perf_counter() - began,
            "peak_rss_bytes": peak_rss(),
            "gpu_peak_bytes": _gpu_peak(),
            "versions": versions,
        }
        with open(file, "a") as out:
            out.write(json.dumps(answer) + "\n")
