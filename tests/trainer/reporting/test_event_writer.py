"""Which events a rank writes, and when."""

from __future__ import annotations

from pathlib import Path

from finetune_api.messages import events
from finetune_trainer.errors import run_error_from
from finetune_trainer.reporting.event_writer import EventWriter


def _events(path: Path) -> list[events.Event | None]:
    return [events.decode(line) for line in path.read_text().splitlines()]


def test_other_ranks_report_only_errors(tmp_path: Path) -> None:
    path = tmp_path / "events" / "rank-1.jsonl"
    reporter = EventWriter(path, 1)
    reporter.phase("training")
    reporter.decision("dtype", "float32", "so")
    error = ValueError("boom")
    reporter.error(run_error_from(error), error)
    (event,) = _events(path)
    assert isinstance(event, events.ErrorEvent)
    assert (event.rank, event.reason, event.message) == (1, "TrainingError", "ValueError: boom")
    assert event.traceback


def test_long_work_repeats_its_phase_but_not_too_often(tmp_path: Path) -> None:
    now = 0.0
    reporter = EventWriter(tmp_path / "events.jsonl", 0, clock=lambda: now)
    reporter.phase("evaluating")
    for second in range(40):
        now = float(second)
        reporter.heartbeat()
    assert [(e.type, e.time) for e in _events(tmp_path / "events.jsonl") if e] == [
        ("phase", 0.0),
        ("phase", 16.0),
        ("phase", 32.0),
    ]
