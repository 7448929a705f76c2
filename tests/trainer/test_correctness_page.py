"""docs/correctness.md names, for each of 28 bugs, tests that are about it, and what they were seen to fail on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from trainer import bugs

_HERE = Path(__file__).parent
_PAGE = _HERE.parents[1] / "docs" / "correctness.md"


def _told() -> dict[str, set[int]]:
    """Bug numbers by test."""
    found = {}
    for path in sorted(_HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                start = re.match(r"Bugs? ([\d, and]+):", ast.get_docstring(node) or "")
                found[f"{path.name}::{node.name}"] = {int(n) for n in re.findall(r"\d+", start[1])} if start else set()
    return found


def _listed() -> list[tuple[int, str, list[str]]]:
    """The page's table: number, what it was seen to fail on, tests."""
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \| ([^|]*) \|$", _PAGE.read_text(), flags=re.MULTILINE)
    return [(int(number), what, re.findall(r"`([^`]+)`", tests)) for number, what, tests in rows]


def test_each_bug_is_listed_once_with_tests_that_are_about_it() -> None:
    told = _told()
    assert [number for number, *_ in _listed()] == list(range(1, 29))
    for number, _, tests in _listed():
        assert tests, number
        for test in tests:
            assert number in told.get(test, set()), f"{test} isn't about bug {number}"


def test_each_test_has_a_bug_to_fail_on() -> None:
    for number, what, tests in _listed():
        put_back = [bug for bug in bugs.ALL if bug.number == number]
        assert what == "; ".join(bug.what for bug in put_back)
        assert set(tests) == {test for bug in put_back for test in bug.tests}
