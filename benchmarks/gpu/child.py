"""The stage's side of the check: its options, and how it reports findings.

A stage is its own process, `python -m benchmarks.gpu.stages.NAME`. It prints each finding as soon
as it is known, as a line that begins with MARK; whatever else it prints is its log.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Finding, Verdict

MARK = "@finding "


@dataclass(frozen=True)
class Setting:
    """A stage's options.

    `tiny` is a rehearsal, at sizes that a CPU computes in seconds. `short` selects a few of many
    similar cases. `out` is the folder for large results, such as profiles.
    """

    device: str
    tiny: bool
    short: bool
    out: Path


class Stage:
    """Reports the findings of a stage."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self.setting = setting

    def report(self, name: str, verdict: Verdict, text: str, *, seconds: float = 0.0, **figures: Any) -> None:
        """Prints a finding; `figures` are in base units."""
        finding = Finding(self.name, name, verdict, text, figures, round(seconds, 3))
        print(MARK + json.dumps(asdict(finding)), flush=True)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Runs one case of several: an exception becomes a finding, so that the next case runs."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.report(name, "failed", text[:400], seconds=time.perf_counter() - began)


def main(name: str, run: Callable[[Stage], None]) -> None:
    """Parses the options and runs the stage; the entry point of each stage module."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.stages.{name}")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true", help="use a rehearsal's sizes")
    parser.add_argument("--short", action="store_true", help="run only a few cases")
    parser.add_argument("--out", type=Path, required=True, help="folder for large results, such as profiles")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(Stage(name, Setting(options.device, options.tiny, options.short, options.out)))


def parsed(line: str) -> Finding | None:
    """Returns the finding in a line of a stage's output, None if it is a log line."""
    if not line.startswith(MARK):
        return None
    return Finding(**json.loads(line.removeprefix(MARK)))
