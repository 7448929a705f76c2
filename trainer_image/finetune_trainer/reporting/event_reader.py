"""Reads the events file and the log that a rank appends to. It never blocks."""

from __future__ import annotations

from pathlib import Path

from finetune_api.messages import events


class EventReader:
    """Reads a growing events file and remembers its position.

    An incomplete last line is read once its newline has arrived; a line that isn't a known event
    is skipped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._partial_line = b""

    def read(self) -> tuple[events.Event, ...]:
        """Returns the events that were appended since the last call, in order."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return ()
        self._offset += len(data)
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        decoded = (events.decode(line) for line in lines if line.strip())
        return tuple(event for event in decoded if event is not None)


def since(path: Path, offset: int) -> str:
    """Returns a log file's text from byte `offset` on; empty if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def last_lines(path: Path, limit_bytes: int = 4000) -> str:
    """Returns the complete lines at the end of a log file; empty if there is no such file."""
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
