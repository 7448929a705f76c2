"""The test runner: every test is in one group, nothing fails unseen, and one line sums up."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from testrun import groups
from testrun.groups import Group, Outcome

TESTS = Path(__file__).parents[1]


def test_every_test_file_is_in_exactly_one_group() -> None:
    paths = [path for group in groups.divide(groups.entries(TESTS)) for path in group.paths]
    assert len(paths) == len(set(paths))
    files = {path.relative_to(TESTS.parent).as_posix() for path in TESTS.rglob("test_*.py")}
    assert {file for file in files if not any(f"{file}/".startswith(f"{path}/") for path in paths)} == set()
    assert {f"tests/{name}" for name in groups.CONTROLLERS + groups.PODS + groups.NODES} <= set(paths)


def test_groups_run_one_after_the_other_where_memory_is_short() -> None:
    three = groups.divide(["api", "e2e", "trainer"])
    assert groups.waves(three, groups.SIDE_BY_SIDE_BYTES) == [three]
    one_by_one = [(replace(group, processes=1),) for group in three]
    assert groups.waves(three, groups.SIDE_BY_SIDE_BYTES - 1) == one_by_one


_REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><system-out/></testcase>
<testcase name="c"><failure/></testcase><testcase name="d"><error/></testcase><testcase name="e"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted_and_a_torn_one_is_none(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    assert groups.read(file) is None
    file.write_text(_REPORT)
    assert groups.read(file) == Outcome(passed=2, failed=1, errors=1, skipped=1)
    file.write_text(_REPORT[:-10])
    assert groups.read(file) is None


def test_the_closing_line_leaves_out_what_there_is_none_of() -> None:
    assert (Outcome(passed=3) + Outcome(passed=2)).line(12.4) == "5 passed, 0 failed in 12 s"
    line = Outcome(1, 2, 3, 4, 5).line(0)
    assert line == "1 passed, 2 failed, 3 errors, 4 skipped, 5 unstable in 0 s"


def test_a_second_run_replaces_failures() -> None:
    assert Outcome(7, 2, 1, 4).after(Outcome(2, 1)) == Outcome(9, 1, 0, 4, 2)


def test_only_a_few_known_failures_run_a_second_time() -> None:
    few = [str(number) for number in range(groups.ONCE_MORE)]
    assert groups.once_more(Outcome(9, len(few) - 1, 1), few)
    assert not groups.once_more(Outcome(9), [])
    assert not groups.once_more(Outcome(9, len(few) + 1), [*few, "x"])
    assert not groups.once_more(Outcome(9, 2), ["one"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a ..\n== 2 passed ==\n", ""),
        ("a .F\n=== FAILURES ===\nwhy\n", "=== FAILURES ===\nwhy\n"),
        ("a E\n=== ERRORS ===\nx\n=== FAILURES ===\n", "=== ERRORS ===\nx\n=== FAILURES ===\n"),
        ("FAILURES in a sentence\n", ""),
    ],
)
def test_failures_are_cut_out_of_the_output(text: str, expected: str) -> None:
    assert groups.failures(text) == expected


_PROGRAM = """
import sys
from pathlib import Path
from testrun import __main__ as program
from testrun.groups import Group
program.ROOT = Path(sys.argv[1])
program.available_memory = lambda _: 1 << 40
program.divide = lambda _: (Group("first", ("one",)), Group("second", ("two",), niceness=5, processes=int(sys.argv[2])))
sys.exit(program.main(sys.argv[3:]))
"""


# A nested pytest starts twice as fast without plugins that it doesn't need.
_ONLY_XDIST = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}

_FAILS_ONCE = """
import pytest
from pathlib import Path
@pytest.mark.parametrize("name", ["a b"])
def test_b(name):
    mark = Path(__file__).with_name("mark")
    first = not mark.exists()
    mark.touch()
    assert 2 == (3 if first else 2)
"""


_IS_NICE = """
import os
from pathlib import Path
def test_b():
    assert os.nice(0) == NICENESS
    session = Path("/proc/self/autogroup")
    assert not session.exists() or session.read_text().endswith(" nice 5\\n")
""".replace("NICENESS", str(min(19, os.nice(0) + 5)))


@pytest.mark.parametrize(
    ("processes", "second", "options", "code", "shown"),
    [
        (1, _IS_NICE, [], 0, ["2 passed, 0 failed in"]),
        (
            1,
            "def test_b(): assert 1 == 2",
            [],
            1,
            ["assert 1 == 2", "Once more, alone: two/test", "1 passed, 1 failed in"],
        ),
        (1, "def test_b(): pass\ndef test_c(): assert 1 == 2", ["--tb=no"], 1, ["2 passed, 1 failed in"]),
        (
            2,
            _FAILS_ONCE,
            [],
            0,
            ["assert 2 == 3", "Once more, alone: two/test_two.py::test_b[a b]", "2 passed, 0 failed, 1 unstable in"],
        ),
        (2, "raise OSError('broken')", [], 1, ["OSError: broken", "1 passed, 0 failed, 1 errors in"]),
        (
            1,
            "import os\ndef test_b(): os._exit(9)",
            [],
            1,
            ["second: pytest ended with exit code 9", "1 passed, 0 failed"],
        ),
        (
            2,
            "import os\ndef test_b(): os._exit(9)",
            [],
            1,
            ["crashed while running 'two/test_two.py::test_b'", "1 passed"],
        ),
        (2, "def test_b(): pass", ["-k", "test_a"], 0, ["1 passed, 0 failed in"]),
        (1, "def test_b(): pass", ["-k", "nothing"], 1, ["0 passed, 0 failed in"]),
    ],
)
def test_both_groups_decide_the_exit_code(
    processes: int, second: str, options: list[str], code: int, shown: list[str], tmp_path: Path
) -> None:
    (tmp_path / "tests").mkdir()
    for name, text in (("one", "def test_a(): pass"), ("two", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"test_{name}.py").write_text(text)
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path), str(processes), *options],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent / "hack"), **_ONLY_XDIST},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    for text in shown:
        assert text in ended.stdout


def test_a_group_names_its_tests() -> None:
    assert groups.divide(["trainer", "nodes", "api", "images"]) == (
        Group("nodes", ("tests/nodes",)),
        Group("pods", ("tests/images",), processes=2, apart=True),
        Group("cluster", ("tests/api",), processes=2),
        Group("compute", ("tests/trainer",), niceness=5, processes=3),
    )
