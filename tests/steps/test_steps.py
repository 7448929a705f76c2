"""The steps of long commands: what is shown, what is expected, and how they end."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import steps
from steps import Step, StepFailed, Steps, checks, timings
from steps.display import progress_line

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (65, "1:05"), (3723, "1:02:03")]
)
def test_durations_are_short_to_read(seconds: float, text: str) -> None:
    assert timings.clock(seconds) == text


@pytest.mark.parametrize(
    ("parallel", "cores", "expected"), [(0.0, 16, 100), (1.0, 2, 100), (1.0, 8, 25), (0.5, 4, 75), (1.0, 1, 200)]
)
def test_more_cores_shorten_the_parallel_share(parallel: float, cores: int, expected: float) -> None:
    assert timings.expected(100, parallel, cores) == expected


def test_the_last_durations_are_merged_and_damage_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "timings" / "demo.json"
    assert timings.load(file) == {}
    timings.save(file, {"images": 421.04, "cluster": 25})
    timings.save(file, {"cluster": 20})
    assert timings.load(file) == {"images": 421.0, "cluster": 20}
    for damaged in ("{", "[1]", '{"images": "long"}'):
        file.write_text(damaged)
        assert timings.load(file) == {}


def test_a_line_says_elapsed_expected_and_left() -> None:
    line = progress_line("2/5 images", 65, 421, 800, "compiling")
    assert line == "2/5 images: 1:05 of about 7:01, about 13:20 left in total  compiling"
    assert progress_line("1/1 job", 3, 0, 0) == "1/1 job: 3 s"


def _steps(folder: Path, out: io.StringIO, *, done: bool = False) -> Steps:
    both = (Step("first", "the first thing", 10, is_done=lambda: done), Step("second", "the second thing", 20))
    return Steps("test", both, folder, out)


def test_each_step_has_a_line_before_and_after_and_its_duration_is_remembered(tmp_path: Path) -> None:
    out = io.StringIO()
    all_steps = _steps(tmp_path, out)
    assert all_steps.overview() == f"2 of 2 steps to do, about 30 s; log: {tmp_path / 'test.log'}"
    with all_steps.step("first"):
        assert all_steps.call(
            [sys.executable, "-c", "import sys; print('answer'); print('noise', file=sys.stderr)"]
        ) == ("answer")
    with all_steps.step("second"):
        pass
    lines = out.getvalue().splitlines()
    assert lines[0] == "▸ 1/2 the first thing: 0 s of about 10 s, about 30 s left in total"
    assert lines[1].startswith("✓ 1/2 the first thing: done in ")
    assert lines[2].startswith("▸ 2/2 the second thing: 0 s of about 20 s")
    assert "noise" in all_steps.log.read_text()
    assert "noise" not in out.getvalue()
    assert set(timings.load(tmp_path / "test.json")) == {"first", "second"}
    assert _steps(tmp_path, out).total() < 5  # as long as it took the last time


def test_what_is_there_already_is_neither_expected_nor_remembered(tmp_path: Path) -> None:
    all_steps = _steps(tmp_path, io.StringIO(), done=True)
    assert all_steps.overview().startswith("1 of 2 steps to do, about 20 s")
    with all_steps.step("first"):
        pass
    assert timings.load(tmp_path / "test.json") == {}


def test_a_failed_program_shows_the_end_of_the_log(tmp_path: Path) -> None:
    out = io.StringIO()
    all_steps = _steps(tmp_path, out)
    program = "import sys; [print('line', n, file=sys.stderr) for n in range(40)]; sys.exit(3)"
    with pytest.raises(StepFailed, match="ended with exit code 3") as failed, all_steps.step("first"):
        all_steps.call([sys.executable, "-c", program])
    assert "line 39" in str(failed.value)
    assert "line 19\n" not in str(failed.value)
    assert "✗ 1/2 the first thing: failed after" in out.getvalue()
    assert timings.load(tmp_path / "test.json") == {}


def test_programs_run_side_by_side_and_answer_in_order(tmp_path: Path) -> None:
    all_steps = _steps(tmp_path, io.StringIO())
    meet = (
        "import sys, time, pathlib; mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "print(mine.name)"
    )
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    commands = [[sys.executable, "-c", meet, first, second], [sys.executable, "-c", meet, second, first]]
    assert all_steps.call_all(commands) == ["first", "second"]


@pytest.mark.parametrize("interrupts", [signal.SIG_IGN, signal.default_int_handler], ids=["background", "terminal"])
def test_a_program_that_fails_ends_those_beside_it(interrupts: Any, tmp_path: Path) -> None:
    """In a shell's background job SIGINT is ignored, and programs inherit that."""
    previous = signal.signal(signal.SIGINT, interrupts)
    try:
        all_steps = _steps(tmp_path, io.StringIO())
        begin = time.monotonic()
        commands = [["sleep", "60"], [sys.executable, "-c", "import sys; sys.exit('no disk')"]]
        with pytest.raises(StepFailed, match="ended with exit code 1") as failed:
            all_steps.call_all(commands)
        assert time.monotonic() - begin < 20
        assert "no disk" in str(failed.value)
    finally:
        signal.signal(signal.SIGINT, previous)


_INTERRUPTED = """
import sys
from pathlib import Path
from steps import Step, Steps
steps = Steps("test", (Step("first", "the first thing", 10),), Path(sys.argv[1]))
with steps.step("first"):
    steps.call([sys.executable, "-c", "import os, time; open(r'{0}/pid', 'w').write(str(os.getpid())); time.sleep(60)".format(sys.argv[1])])
"""  # fmt: skip  # noqa: E501


def test_ctrl_c_ends_the_programs_of_a_step(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "hack")},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs inherit an ignored SIGINT, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    file = tmp_path / "pid"
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "✗ 1/1 the first thing: stopped after" in shown
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_each_lack_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        problems = steps.check(
            (
                checks.python((99, 0)),
                checks.root("building an image"),
                checks.program("no-such-program", "no-such-package"),
                checks.disk(tmp_path / "missing" / "folder", 1 << 60),
                checks.memory(1 << 60),
                checks.port(taken.getsockname()[1]),
            )
        )
    assert [problem.lack.split(" ")[0] for problem in problems] == [
        "python3", "building", "no-such-program", str(tmp_path / "missing" / "folder"),
        str(problems[4].lack.split(" ")[0]), "port",
    ]  # fmt: skip
    assert all(problem.remedy.endswith((".", ")")) and ". " in str(problem) for problem in problems)


def test_nothing_is_lacking_where_everything_is_there(tmp_path: Path) -> None:
    met = (
        checks.python((3, 11)),
        checks.linux(),
        checks.disk(tmp_path, 1),
        checks.memory(1),
        checks.program("ls", "x"),
    )
    assert steps.check(met) == ()


def test_available_memory_is_read_in_bytes() -> None:
    assert checks.available_memory("MemTotal: 100 kB\nMemAvailable:     42 kB\n") == 42 * 1024


def test_an_index_out_of_reach_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    problem = checks.package_index()
    assert problem is not None
    assert "can't reach its package index" in problem.lack
    assert "PIP_INDEX_URL" in problem.remedy


@pytest.mark.parametrize(
    ("problems", "ending", "code", "shown"),
    [
        ((), lambda: 0, 0, ""),
        ((), lambda: 7, 7, ""),
        ((steps.Problem("no disk", "Free some."),), lambda: 0, 2, "make it: no disk. Free some."),
        ((), lambda: _raise(StepFailed("it broke")), 1, "make it: it broke"),
        ((), lambda: _raise(KeyboardInterrupt()), 130, "make it: stopped; `make it` resumes here"),
        ((), lambda: 130, 130, "make it: stopped; `make it` resumes here"),
    ],
)
def test_a_command_ends_with_a_code_and_a_message(
    problems: tuple[steps.Problem, ...],
    ending: Callable[[], int],
    code: int,
    shown: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start() -> Steps:
        return _steps(tmp_path, io.StringIO())

    assert steps.run_command("make it", problems, start, lambda _: ending()) == code
    assert capsys.readouterr().err.strip() == shown


def _raise(error: BaseException) -> int:
    raise error


_ATTACHED = """
import os, sys
from pathlib import Path
from steps import attached
sys.exit(attached([sys.executable, sys.argv[1], sys.argv[2]], Path(), os.environ))
"""
_SAVES = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
try:
    (folder / "ready").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # longer than subprocess.run would wait
    (folder / "saved").touch()
    sys.exit(143)
"""


def test_ctrl_c_lets_the_attached_program_save(tmp_path: Path) -> None:
    (tmp_path / "saves.py").write_text(_SAVES)
    process = subprocess.Popen(
        [sys.executable, "-c", _ATTACHED, str(tmp_path / "saves.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "hack")},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) == 130
    assert (tmp_path / "saved").exists()
