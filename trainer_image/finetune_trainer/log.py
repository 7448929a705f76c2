"""The supervisor's own log: one JSON object a line on stdout, or plain text for a person at a terminal.

Shared with the ranks' output, which goes through `relay`, so that lines are never torn. Never decides anything.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Level = Literal["info", "warning", "error"]


class Log:
    """Thread-safe; `fields` are JSON values; None is left out."""

    def __init__(self, stream: TextIO | None = None, *, text: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._text = text
        self._lock = threading.Lock()

    def info(self, message: str, **fields: Any) -> None:
        self._say("info", message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        self._say("warning", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        self._say("error", message, fields)

    def relay(self, rank: int, line: str) -> None:
        """One line that a rank printed."""
        self._write(f"[rank {rank}] {line}")

    def _say(self, level: Level, message: str, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC)
        fields = {key: value for key, value in fields.items() if value is not None}
        if self._text:
            tail = "".join(f" {key}={value}" for key, value in fields.items())
            self._write(f"{now.astimezone():%H:%M:%S} {level}: {message}{tail}")
        else:
            line = {"time": now.isoformat(timespec="milliseconds"), "level": level, "message": message, **fields}
            self._write(json.dumps(line, default=str, ensure_ascii=False))

    def _write(self, line: str) -> None:
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                return  # whoever read our log has gone; training goes on
