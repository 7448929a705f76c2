"""The results of a check, as a JSON file that is complete after every finding."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["right", "wrong", "figure", "skipped", "failed"]
"""The kind of a finding.

right and wrong: a claim was tested. figure: something was measured. skipped: it can't be tested
here, for the reason in the text. failed: the check itself failed.
"""


@dataclass(frozen=True)
class Finding:
    """One finding of a stage.

    `figures` are in base units, which are part of their names: seconds, peak_bytes,
    tokens_per_second, …
    """

    stage: str
    name: str
    verdict: Verdict
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        """Returns the line that is printed, at most 220 characters."""
        return f"{self.stage:<10} {self.name:<34} {self.verdict:<8} {self.text}"[:220].rstrip()


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended: done, stopped at its limit, or `code N`.

    `log` has the last lines of its log if it failed.
    """

    stage: str
    ended: str
    seconds: float
    log: str = ""


class Results:
    """Appends to one file, which is valid JSON at any time, even if this process is killed."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self._about = about
        self.findings: list[Finding] = []
        self.stages: list[StageEnd] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, finding: Finding) -> None:
        """Adds a finding and writes the file."""
        self.findings.append(finding)
        self._write()

    def end(self, stage: StageEnd) -> None:
        """Adds the end of a stage and writes the file."""
        self.stages.append(stage)
        self._write()

    def _write(self) -> None:
        document = {
            **self._about,
            "stages": [asdict(stage) for stage in self.stages],
            "findings": [asdict(finding) for finding in self.findings],
        }
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(partial, self._path)
