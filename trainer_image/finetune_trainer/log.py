"""Writes the supervisor's log: one JSON object per line on stdout, or plain text for a terminal.

The ranks' output goes through `relay` of the same object, so lines never interleave.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from finetune_api import untrusted

_MAX_LINE_CHARACTERS = 1 << 16
Level = Literal["info", "warning", "error"]


class Log:
    """Writes log entries; thread-safe. `fields` are JSON values; None is omitted."""

    def __init__(self, stream: TextIO | None = None, *, text: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._text = text
        self._lock = threading.Lock()

    def info(self, message: str, **fields: Any) -> None:
        """Logs an event of normal operation."""
        self._log("info", message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        """Logs a problem that doesn't end the attempt."""
        self._log("warning", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """Logs a problem that ends the attempt."""
        self._log("error", message, fields)

    def relay(self, rank: int, line: str) -> None:
        """Writes one line that a rank printed, prefixed with its number."""
        self._write(f"[rank {rank}] {line}")

    def _log(self, level: Level, message: str, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC)
        fields = {key: value for key, value in fields.items() if value is not None}
        if self._text:
            suffix = "".join(f" {key}={value}" for key, value in fields.items())
            self._write(f"{now.astimezone():%H:%M:%S} {level}: {message}{suffix}")
        else:
            entry = {"time": now.isoformat(timespec="milliseconds"), "level": level, "message": message, **fields}
            self._write(json.dumps(entry, default=str, ensure_ascii=False))

    def _write(self, line: str) -> None:
        # A rank, a file or a server may have put anything into it.
        line = untrusted.without_url_secrets(untrusted.line(line, _MAX_LINE_CHARACTERS))
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                return  # the reader of stdout is gone; training continues
