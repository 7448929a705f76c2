"""Where ranks that don't move are: faulthandler's dumps → who waits for whom. Pure; asked once by the watch.

In a group that hangs nearly all ranks wait in a collective; the one that doesn't is what they wait for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SECTION = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$", re.M)
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>\S+)$', re.M)
_OURS = "/finetune_trainer/"
_TOGETHER = ("/torch/distributed/", "/deepspeed/comm/")
_WRAPPERS = ("_call_impl", "_wrapped_call_impl", "inner", "wrapper")  # torch.nn.Module's, and decorators'
_SHOWN = 4


@dataclass(frozen=True)
class Place:
    """A rank's frames, the innermost first, and whether it waits there for other ranks."""

    frames: tuple[str, ...]
    waits: bool

    def __str__(self) -> str:
        return " < ".join(self.frames[:_SHOWN])

    @property
    def text(self) -> str:
        """One frame a line, the innermost last, where a text that is too long is kept."""
        return "\n".join(reversed(self.frames))


def place(dump: str) -> Place | None:
    """Of the thread that trains; None where the dump holds no stack."""
    bounds = [found.start() for found in _SECTION.finditer(dump)]
    sections = [dump[a:b].strip() for a, b in zip(bounds, [*bounds[1:], len(dump)], strict=False)]
    threads = [section for section in sections if _FRAME.search(section)]
    if not threads:
        return None
    training = next((s for s in threads if f"{_OURS}train.py" in s), None)
    text = training or next((s for s in threads if _OURS in s), threads[-1])
    found = [(match["file"], match["line"], match["function"]) for match in _FRAME.finditer(text)]
    frames = tuple(
        f"{function} ({file.rpartition('/')[2]}:{line})" for file, line, function in found if function not in _WRAPPERS
    )
    return Place(frames, any(part in file for file, _, _ in found[:_SHOWN] for part in _TOGETHER))


def culprit(places: Mapping[int, Place | None]) -> int:
    """The rank to look at first: one that waits for nobody, else one that said nothing, else the first."""
    moving = [rank for rank, at in places.items() if at is not None and not at.waits]
    silent = [rank for rank, at in places.items() if at is None]
    return min(moving or silent or places)


def told(places: Mapping[int, Place | None]) -> str:
    """A sentence about all ranks of a node, those that wait together."""
    waiting = [str(rank) for rank, at in places.items() if at is not None and at.waits]
    said = [f"rank {rank} is at {at}" for rank, at in places.items() if at is not None and not at.waits]
    said += [f"rank {rank} tells no stack" for rank, at in places.items() if at is None]
    if waiting:
        said.append(f"rank{'s' if len(waiting) > 1 else ''} {', '.join(waiting)} of this node wait for others")
    return "; ".join(said)
