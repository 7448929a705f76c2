"""docs/correctness.md lists, for each of 28 bugs, the tests about it and the change that they
failed on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from trainer.support import mutants

_HERE = Path(__file__).parent
_PAGE = _HERE.parents[1] / "docs" / "correctness.md"


def _bug_numbers() -> dict[str, set[int]]:
    """Returns the bug numbers in each test's docstring, by test."""
    numbers = {}
    for path in sorted(_HERE.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                start = re.match(r"Bugs? ([\d, and]+):", ast.get_docstring(node) or "")
                numbers[f"{path.relative_to(_HERE).as_posix()}::{node.name}"] = (
                    {int(n) for n in re.findall(r"\d+", start[1])} if start else set()
                )
    return numbers


def _table() -> list[tuple[int, str, list[str]]]:
    """Returns the rows of the page's table: number, the changes that the tests failed on, tests."""
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \| ([^|]*) \|$", _PAGE.read_text(), flags=re.MULTILINE)
    return [(int(number), what, re.findall(r"`([^`]+)`", tests)) for number, what, tests in rows]


def test_each_bug_is_listed_once_with_tests_that_are_about_it() -> None:
    numbers = _bug_numbers()
    assert [number for number, *_ in _table()] == list(range(1, 29))
    for number, _, tests in _table():
        assert tests, number
        for test in tests:
            assert number in numbers.get(test, set()), f"{test} isn't about bug {number}"


def test_each_test_has_a_bug_to_fail_on() -> None:
    for number, what, tests in _table():
        bugs = [bug for bug in mutants.ALL if bug.number == number]
        assert what == "; ".join(bug.what for bug in bugs)
        assert set(tests) == {test for bug in bugs for test in bug.tests}
