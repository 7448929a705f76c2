"""Decides which tests run together, and adds up their results.

Pure, except for listing tests and reading reports.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Folders of tests that mostly wait: for an API server, for a kubelet, a container or an image, or
# until Kubernetes gives up a node.
CONTROLLERS = ("api", "chart", "k8s_operator", "localcluster", "security")
PODS = ("e2e", "images")
NODES = ("nodes",)
_FAILURE_TITLES = (" ERRORS ", " FAILURES ", " short test summary info ")
ONCE_MORE = 3  # at most so many failed tests run a second time; more are no accident
SIDE_BY_SIDE_BYTES = 16 << 30  # available memory that all groups need together


@dataclass(frozen=True)
class Group:
    """Tests of one run of pytest. `niceness` (0 to 19) leaves processor time to others.

    With several `processes`, pytest-xdist gives each of them one file after the other, or if tests
    of a file may run `apart`, single tests.
    """

    name: str
    paths: tuple[str, ...]
    niceness: int = 0
    processes: int = 1
    apart: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Pytest's options for this group."""
        if self.processes == 1:
            return ()
        order = ("worksteal",) if self.apart else ("loadfile", "--no-loadscope-reorder")
        return ("-n", str(self.processes), "--max-worker-restart", "0", "--dist", *order)


@dataclass(frozen=True)
class Outcome:
    """The numbers of tests by result.

    `errors` are tests whose fixtures failed; `unstable` ones passed only when they ran once more.
    """

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    unstable: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.passed + other.passed,
            self.failed + other.failed,
            self.errors + other.errors,
            self.skipped + other.skipped,
            self.unstable + other.unstable,
        )

    def after(self, repeat: Outcome) -> Outcome:
        """Returns these results with the failed tests replaced by their results of a second run."""
        return Outcome(self.passed + repeat.passed, repeat.failed, repeat.errors, self.skipped, repeat.passed)

    def line(self, seconds: float) -> str:
        """Formats the last line, as in `3562 passed, 0 failed in 1034 s`."""
        rest = ((self.errors, "errors"), (self.skipped, "skipped"), (self.unstable, "unstable"))
        more = [f"{count} {name}" for count, name in rest if count]
        counts = ", ".join([f"{self.passed} passed", f"{self.failed} failed", *more])
        return f"{counts} in {seconds:.0f} s"


def divide(entries: Iterable[str]) -> tuple[Group, ...]:
    """Divides the entries of tests/ into three groups that wait, and one that computes.

    A group without tests is left out.
    """
    names = sorted(entries)

    def of(*folders: str) -> tuple[str, ...]:
        return tuple(f"tests/{name}" for name in names if name in folders)

    rest = [name for name in names if name not in CONTROLLERS + PODS + NODES]
    divided = (
        Group("nodes", of(*NODES)),
        Group("pods", of(*PODS), processes=2, apart=True),
        Group("cluster", of(*CONTROLLERS), processes=2),
        Group("compute", of(*rest), niceness=5, processes=3),
    )
    return tuple(group for group in divided if group.paths)


def entries(tests: Path) -> list[str]:
    """Lists the folders with tests and the test files of tests/."""
    return [
        path.name
        for path in tests.iterdir()
        if (path.is_dir() and any(path.rglob("test_*.py"))) or (path.is_file() and path.name.startswith("test_"))
    ]


def waves(groups: Sequence[Group], available: int) -> list[tuple[Group, ...]]:
    """Returns the groups that run at the same time, one wave after the other.

    `available` is the available memory in bytes. If it is short, each group is a single process.
    """
    if available >= SIDE_BY_SIDE_BYTES:
        return [tuple(groups)]
    return [(replace(group, processes=1),) for group in groups]


def read(report: Path) -> Outcome | None:
    """Counts the tests of pytest's JUnit XML; None if there is no complete report."""
    try:
        root = ET.parse(report).getroot()  # written by our own pytest
    except (OSError, ET.ParseError):
        return None
    outcome = Outcome()
    for case in root.iter("testcase"):
        kinds = {child.tag for child in case}
        if "failure" in kinds:
            outcome += Outcome(failed=1)
        elif "error" in kinds:
            outcome += Outcome(errors=1)
        elif "skipped" in kinds:
            outcome += Outcome(skipped=1)
        else:
            outcome += Outcome(passed=1)
    return outcome


def last_failed(cache: Path) -> list[str]:
    """Returns the IDs of the failed tests in pytest's cache folder."""
    try:
        failed: dict[str, bool] = json.loads((cache / "v/cache/lastfailed").read_text())
    except FileNotFoundError:
        return []
    return sorted(failed)


def once_more(total: Outcome, failed: Sequence[str]) -> bool:
    """Whether the failed tests run a second time: if they are few and each is known by its ID."""
    return 0 < total.failed + total.errors == len(failed) <= ONCE_MORE


def is_summary(line: str) -> bool:
    """Whether a line of pytest's output starts the summary after the last test."""
    return line.startswith("=") and any(title in line for title in (*_FAILURE_TITLES, " warnings summary "))


def failures(text: str) -> str:
    """Returns pytest's output from its first failure to the end; empty if all passed."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.startswith("=") and any(title in line for title in _FAILURE_TITLES):
            return "".join(lines[number:])
    return ""
