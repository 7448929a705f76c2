"""Shows one line per step, redrawn each second on a terminal and printed now and then elsewhere."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from typing import TextIO

from steps.timings import clock

_QUIET_SECONDS = 30.0  # between two lines if there is no terminal


def progress_line(title: str, elapsed: float, expected: float, left: float, detail: str = "") -> str:
    """Formats the line of a running step.

    All times are in seconds; `left` is the expected time until the end of the whole command.
    """
    about = f" of about {clock(expected)}" if expected else ""
    rest = f", about {clock(left)} left in total" if left > 0 else ""
    shown = f"  {detail}" if detail else ""
    return f"{title}: {clock(elapsed)}{about}{rest}{shown}"


class Line:
    """Shows a step from `start` to `stop`. `detail` returns the step's current activity.

    `expected` and `later` are the expected seconds of this step and of those after it.
    """

    def __init__(self, out: TextIO, title: str, expected: float, later: float, detail: Callable[[], str]) -> None:
        self._out, self._title, self._expected, self._later = out, title, expected, later
        self._detail = detail
        self._begin = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self, *, live: bool = True) -> None:
        """Starts to show the step. Unless `live`, nothing more is shown until it ends."""
        if not (live and self._out.isatty()):
            print(f"▸ {self._text(with_detail=False)}", file=self._out, flush=True)
        if live:
            self._thread.start()

    def stop(self, mark: str, ending: str) -> float:
        """Shows how the step ended. Returns its seconds."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        seconds = time.monotonic() - self._begin
        start = "\r\x1b[K" if self._out.isatty() else ""
        print(f"{start}{mark} {self._title}: {ending} {clock(seconds)}", file=self._out, flush=True)
        return seconds

    def _follow(self) -> None:
        every = 1.0 if self._out.isatty() else _QUIET_SECONDS
        while not self._over.wait(every):
            if self._out.isatty():
                width = shutil.get_terminal_size().columns - 3
                self._out.write(f"\r\x1b[K▸ {self._text()[:width]}")
                self._out.flush()
            else:
                print(f"  {self._text()}", file=self._out, flush=True)

    def _text(self, *, with_detail: bool = True) -> str:
        elapsed = time.monotonic() - self._begin
        left = max(0.0, self._expected - elapsed) + self._later
        return progress_line(self._title, elapsed, self._expected, left, self._detail() if with_detail else "")
