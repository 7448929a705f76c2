"""Finds out from the flight recorders of a node's ranks which rank is behind in a collective. Pure.

All ranks of a process group call the same collectives in the same order, so the one that has called
the fewest is the one that the others wait for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SHOWN = 3  # collectives of a rank that are logged


@dataclass(frozen=True)
class Call:
    """A collective that a rank has called: the `number`-th of its process group."""

    group: str
    number: int
    name: str
    pending: bool

    def __str__(self) -> str:
        return f"{self.name} number {self.number}{' (pending)' if self.pending else ''}"


def calls(text: str) -> tuple[Call, ...]:
    """Returns the collectives in a dump, in their order within each group; empty for a damaged
    one."""
    try:
        by_backend = json.loads(text)
        return tuple(
            _call(backend, entry)
            for backend, record in sorted(by_backend.items())
            for entry in record.get("entries", ())
            if not entry.get("is_p2p")
        )
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return ()


def _call(backend: str, entry: Mapping[str, Any]) -> Call:
    name = str(entry["profiling_name"])
    return Call(f"{backend} {entry['pg_id']}", int(entry["collective_seq_id"]), name, not entry["retired"])


def last_calls(recorded: tuple[Call, ...]) -> str:
    """Returns the last collectives of a rank as text, for the log."""
    return ", ".join(map(str, recorded[-_SHOWN:])) or "none"


def summary(recorded: Mapping[int, tuple[Call, ...]]) -> str:
    """Returns a clause for each rank that has called fewer collectives of a group than another rank
    of this node; empty if there is none."""
    last = {rank: {call.group: call for call in history} for rank, history in recorded.items()}
    clauses = []
    for group in sorted({group for own in last.values() for group in own}):
        numbers = {rank: own[group].number for rank, own in last.items() if group in own}
        most = max(numbers.values())
        waiting = next(own[group] for own in last.values() if group in own and own[group].number == most)
        clauses += [
            f"rank {rank} called {number} collectives and others are in number {most}, {waiting.name}"
            for rank, number in numbers.items()
            if number < most
        ]
    return "; ".join(clauses)
