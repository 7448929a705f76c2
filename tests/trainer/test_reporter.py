"""What a rank says, and when."""

from __future__ import annotations

from pathlib import Path

from finetune_api import events
from finetune_trainer.diagnosis import failed_from
from finetune_trainer.reporter import Reporter


def _told(path: Path) -> list[events.Event | None]:
    return [events.decode(line) for line in path.read_text().splitlines()]


def test_other_ranks_tell_nothing_but_errors(tmp_path: Path) -> None:
    path = tmp_path / "events" / "rank-1.jsonl"
    reporter = Reporter(path, 1)
    reporter.phase("training")
    reporter.decision("dtype", "float32", "so")
    error = ValueError("boom")
    reporter.error(failed_from(error), error)
    (told,) = _told(path)
    assert isinstance(told, events.ErrorEvent)
    assert (told.rank, told.reason, told.message) == (1, "TrainingError", "ValueError: boom")
    assert told.traceback


def test_long_work_says_its_phase_again_but_not_too_often(tmp_path: Path) -> None:
    now = 0.0
    reporter = Reporter(tmp_path / "events.jsonl", 0, clock=lambda: now)
    reporter.phase("evaluating")
    for second in range(40):
        now = float(second)
        reporter.alive()
    assert [(e.type, e.time) for e in _told(tmp_path / "events.jsonl") if e] == [
        ("phase", 0.0),
        ("phase", 16.0),
        ("phase", 32.0),
    ]
