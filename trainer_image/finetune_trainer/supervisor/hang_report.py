"""Finds out from faulthandler's dumps where hanging ranks are and which one the others wait for.

When ranks hang, nearly all of them wait in a collective; they wait for the one that doesn't.
The module is pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SECTION = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$", re.M)
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>\S+)$', re.M)
_TRAINER = "/finetune_trainer/"
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_WRAPPERS = ("_call_impl", "_wrapped_call_impl", "inner", "wrapper")  # of torch.nn.Module and of decorators
_SHOWN_FRAMES = 4


@dataclass(frozen=True)
class StackTrace:
    """Holds a rank's frames, the innermost first; `waits` is set if it waits in a collective."""

    frames: tuple[str, ...]
    waits: bool

    def __str__(self) -> str:
        return " < ".join(self.frames[:_SHOWN_FRAMES])

    @property
    def text(self) -> str:
        """The frames as lines, the innermost last, because long texts are cut at the start."""
        return "\n".join(reversed(self.frames))


def stack_trace(dump: str) -> StackTrace | None:
    """Returns the stack of the thread that trains; None if the dump has no stack."""
    starts = [match.start() for match in _SECTION.finditer(dump)]
    sections = [dump[begin:end].strip() for begin, end in zip(starts, [*starts[1:], len(dump)], strict=False)]
    threads = [section for section in sections if _FRAME.search(section)]
    if not threads:
        return None
    training = next((s for s in threads if f"{_TRAINER}training/loop.py" in s), None)
    text = training or next((s for s in threads if _TRAINER in s), threads[-1])
    calls = [(match["file"], match["line"], match["function"]) for match in _FRAME.finditer(text)]
    frames = tuple(
        f"{function} ({file.rpartition('/')[2]}:{line})" for file, line, function in calls if function not in _WRAPPERS
    )
    return StackTrace(frames, any(part in file for file, _, _ in calls[:_SHOWN_FRAMES] for part in _COLLECTIVES))


def culprit(traces: Mapping[int, StackTrace | None]) -> int:
    """Returns the rank to look at first, given the stack of each rank or None if it printed none.

    It is the first rank that waits for no other, else the first without a stack, else the first.
    """
    moving = [rank for rank, trace in traces.items() if trace is not None and not trace.waits]
    silent = [rank for rank, trace in traces.items() if trace is None]
    return min(moving or silent or traces)


def summary(traces: Mapping[int, StackTrace | None]) -> str:
    """Returns a sentence about all ranks of a node. Ranks that wait for others share a clause."""
    waiting = [str(rank) for rank, trace in traces.items() if trace is not None and trace.waits]
    clauses = [f"rank {rank} is at {trace}" for rank, trace in traces.items() if trace is not None and not trace.waits]
    clauses += [f"rank {rank} printed no stack" for rank, trace in traces.items() if trace is None]
    if len(waiting) == 1:
        clauses.append(f"rank {waiting[0]} of this node waits for other ranks")
    elif waiting:
        clauses.append(f"ranks {', '.join(waiting)} of this node wait for other ranks")
    return "; ".join(clauses)
