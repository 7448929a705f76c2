"""Reads what a rank appends to its events file, complete lines only. Used by the supervisor's loop; never blocks."""

from __future__ import annotations

from pathlib import Path

from finetune_api import events


class Tail:
    """Remembers how far a file was read. A torn last line waits for its newline; an unknown line is skipped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def read(self) -> tuple[events.Event, ...]:
        """The events since the last call, in order."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return ()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        decoded = (events.decode(line) for line in lines if line.strip())
        return tuple(event for event in decoded if event is not None)


def since(path: Path, offset: int) -> str:
    """What a log file has from a byte on."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def last_lines(path: Path, limit_bytes: int = 4000) -> str:
    """The end of a log file, from a line's beginning; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit_bytes))
            data = file.read()
    except FileNotFoundError:
        return ""
    if size > limit_bytes:
        data = data.partition(b"\n")[2]
    return data.decode(errors="replace").strip()
