"""An attempt whose processes are all killed together for memory still makes the next one use less.

Cgroup v2 with memory.oom.group isn't available everywhere, so SIGKILL for a whole process group
replaces the kernel, and two files replace the container's cgroup.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_api.messages.run import JobRef
from finetune_trainer.host_memory import Cgroup, is_scarce
from finetune_trainer.log import Log
from finetune_trainer.storage.local import LocalStorage
from finetune_trainer.supervisor import oom_backoff
from finetune_trainer.supervisor.oom_backoff import MemoryWatch
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup

_JOB = JobRef(namespace="ns", name="job", uid="uid-1", attempt=1)
_ATTEMPT = """
import sys, time
from pathlib import Path
from trainer.supervisor.test_scarce_memory import watch
memory = watch(Path(sys.argv[1]), 95, node=int(sys.argv[2]))
while True:
    memory.look(int(sys.argv[3]))
    time.sleep(0.05)
"""


def _cgroup(folder: Path, used: int) -> Cgroup:
    """Returns the files of a container of which `used` percent of the memory are in use."""
    limit, statistics = folder / "memory.max", folder / "memory.stat"
    limit.write_text("1000\n")
    statistics.write_text(f"anon {10 * used}\nfile 500\n")
    return limit, statistics, "anon"


def watch(folder: Path, used: int, node: int = 0, nodes: int = 2, restarts: int = 0, saved: int = 0) -> MemoryWatch:
    memory = MemoryWatch(_JOB, node, Log(), [_cgroup(folder, used)])
    memory.start(LocalStorage(folder / "out", role="output", display="out"), nodes, restarts, saved)
    return memory


def _notes(folder: Path) -> dict[str, int]:
    return {path.name: json.loads(path.read_text())["halvings"] for path in (folder / "out").rglob("*.json")}


def _wait_for_notes(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(_notes(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("node", [0, 1])
def test_an_attempt_that_is_killed_as_a_whole_while_memory_is_scarce_counts(node: int, tmp_path: Path) -> None:
    program = [sys.executable, "-c", _ATTEMPT, str(tmp_path), str(node), "2"]
    attempt = subprocess.Popen(program, start_new_session=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    _wait_for_notes(tmp_path, 1)
    os.killpg(attempt.pid, signal.SIGKILL)
    attempt.wait()
    assert watch(tmp_path, 50).halvings == 3
    assert _notes(tmp_path) == {"memory.json": 3}
    assert watch(tmp_path, 50).halvings == 3


@pytest.mark.parametrize(
    ("record", "restarts", "saved", "halvings"),
    [
        (None, 0, 0, 0),
        (None, 1, 0, 1),
        (None, 1, 2, 3),
        ((1, 1), 1, 0, 1),
        ((1, 1), 1, 1, 1),
        ((1, 1), 2, 0, 2),
        ((1, 1), 2, 2, 3),
        ((3, 1), 2, 0, 4),
        ((2, 2), 1, 0, 2),
        ((16, 3), 4, 0, 16),
    ],
    ids=[
        "nothing happened",
        "killed without a note",
        "killed without a note, after halvings within the run",
        "recorded",
        "recorded, and resumed from a checkpoint since",
        "recorded once, killed once",
        "recorded once, killed once, after halvings within the run",
        "halved within the run before the record",
        "recorded on one node, but the operator saw another cause",
        "the limit",
    ],
)
def test_each_restart_for_memory_halves_even_if_no_note_was_written(
    record: tuple[int, int] | None, restarts: int, saved: int, halvings: int, tmp_path: Path
) -> None:
    if record is not None:
        storage = LocalStorage(tmp_path / "out", role="output", display="out")
        oom_backoff.write(storage, _JOB, *record, Log())
    assert watch(tmp_path, 50, node=1, restarts=restarts, saved=saved).halvings == halvings
    assert watch(tmp_path, 50, node=0, restarts=restarts, saved=saved).halvings == halvings
    for node in (0, 1):  # also after node 0 has recorded it
        assert watch(tmp_path, 50, node=node, restarts=restarts, saved=saved).halvings == halvings


def test_a_note_and_a_restart_for_the_same_kill_halve_once(tmp_path: Path) -> None:
    memory = watch(tmp_path, 95)
    memory.look(0)
    _wait_for_notes(tmp_path, 1)
    for node in (1, 0, 1):
        assert watch(tmp_path, 50, node=node, restarts=1).halvings == 1


def test_a_record_of_an_older_version_still_counts(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "out", role="output", display="out")
    storage.write(oom_backoff.PATH, b'{"uid": "uid-1", "halvings": 2}')
    assert watch(tmp_path, 50).halvings == 2
    assert watch(tmp_path, 50, restarts=1).halvings == 3
    assert watch(tmp_path, 50, restarts=1).halvings == 3


def test_an_attempt_that_reports_its_end_leaves_no_note(tmp_path: Path) -> None:
    memory = watch(tmp_path, 95)
    memory.look(0)
    memory.end()
    assert _notes(tmp_path) == {}
    assert watch(tmp_path, 50).halvings == 0


def test_an_attempt_with_enough_memory_leaves_no_note(tmp_path: Path) -> None:
    memory = watch(tmp_path, 85)
    memory.look(0)
    memory.end()
    assert _notes(tmp_path) == {}


@pytest.mark.parametrize(("used", "expected"), [(85, False), (95, True)])
def test_memory_is_scarce_if_less_than_a_tenth_is_free(used: int, expected: bool, tmp_path: Path) -> None:
    assert is_scarce([_cgroup(tmp_path, used)]) is expected


def test_a_supervisor_counts_a_note_and_deletes_it(tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    note = setup.output / oom_backoff._note_path(0)
    note.parent.mkdir(parents=True)
    note.write_text('{"uid": "uid-1", "halvings": 0}')
    ended = supervisor_process.supervise(setup.run(attempt=2), setup.folder)
    assert ended.code == 0, ended.output
    assert (setup.folder / "scratch" / "halvings").read_text() == "1"
    assert not note.exists()
