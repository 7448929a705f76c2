"""A rank that loads or writes for longer than stallSeconds isn't stalled while data moves."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from pathlib import Path

from finetune_trainer.reporting import io_heartbeat
from trainer.support import slow_disk_rank, supervisor_process
from trainer.support.supervisor_process import ROOT, FinishedSupervisor, JobSetup

_SLOW = f"{sys.executable} {Path(slow_disk_rank.__file__)}"
_PATH = {"PYTHONPATH": f"{ROOT / 'trainer_image'}:{ROOT / 'operator'}:{ROOT / 'tests'}"}


def _ended(folder: Path, **behavior: float) -> FinishedSupervisor:
    setup = JobSetup(folder).write_inputs().with_changes(stall_seconds=3)
    return supervisor_process.supervise(setup.run(), folder, behavior=behavior, environment=_PATH, ranks=_SLOW)


def test_a_slow_write_that_takes_longer_than_stall_seconds_is_waited_for(tmp_path: Path) -> None:
    ended = _ended(tmp_path, megabytes=40, pause=0.7)
    assert (ended.code, ended.last.outcome) == (0, "succeeded"), ended.output


def test_a_rank_that_hangs_while_it_loads_or_writes_is_stalled(tmp_path: Path) -> None:
    ended = _ended(tmp_path, megabytes=0, pause=120)
    assert (ended.code, ended.last.reason) == (73, "Stalled"), ended.output
    assert "in phase saving" in ended.last.message


def _beats(work: str, path: Path) -> int:
    """Returns the heartbeats during one of three kinds of work that takes about 3 seconds."""
    beats: list[float] = []
    with io_heartbeat.beating(lambda: beats.append(time.monotonic())):
        deadline = time.monotonic() + 3.3
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            offset = 0
            while time.monotonic() < deadline:
                if work == "map":  # as safetensors reads a file
                    sum(mapped[offset : offset + (4 << 20) : mmap.PAGESIZE])
                    offset = (offset + (4 << 20)) % len(mapped)
                    time.sleep(0.2)
                if work == "read":
                    os.pread(file.fileno(), 4 << 20, 0)
                    time.sleep(0.2)
                if work == "spin":  # as NCCL waits for another rank
                    threading.get_ident()
    return len(beats)


def test_reads_and_mapped_files_count_as_progress_and_spinning_does_not(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(os.urandom(1 << 20) * 256)
    assert _beats("read", path) >= 2
    assert _beats("map", path) >= 2
    assert _beats("spin", path) == 0
