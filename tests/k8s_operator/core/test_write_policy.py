"""How often the status of a whole run is written, and how old its figures are, against a constant
interval between two writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import pytest

from finetune_api.status import ProgressStatus, Status
from finetune_operator.core.objects import seconds_between
from finetune_operator.core.status import timestamp
from finetune_operator.core.write_policy import seconds_until_due
from k8s_operator.support.observed_states import NOW

_WRITE_EVERY = 30.0
_POST_SECONDS = 5  # between two posts of the trainer, except for another phase and the first step
_NOTHING = ProgressStatus()
_START = Status(phase="Running", attempt=1, start_time=timestamp(NOW))

Wait = Callable[[Status, Status, datetime], float]
"""Returns how many seconds the second status may wait."""


@dataclass(frozen=True)
class Run:
    """A run of so many seconds, with steps of so many seconds."""

    seconds: int
    step_seconds: int

    def posts(self) -> Iterator[tuple[int, ProgressStatus]]:
        """Yields the seconds since the start, and what is posted then."""
        posted: ProgressStatus | None = None
        posted_at = 0
        for second in range(5, self.seconds):
            progress = self._progress(second)
            is_new = posted is None or progress.phase != posted.phase or (progress.step == 0) != (posted.step == 0)
            differs = posted is None or (progress.step, progress.phase) != (posted.step, posted.phase)
            if is_new or (differs and second - posted_at >= _POST_SECONDS):
                posted, posted_at = progress, second
                yield second, progress

    def _progress(self, second: int) -> ProgressStatus:
        first, last = 45, self.seconds - 40
        total = (last - first) // self.step_seconds
        step = min(max(0, (second - first) // self.step_seconds), total)
        phases = {25: "fetching", 40: "loading", 45: "tokenizing", last: "training", last + 10: "saving"}
        phase = next((name for end, name in phases.items() if second < end), "uploading")
        return ProgressStatus(
            attempt=1,
            phase=phase,
            step=step,
            total_steps=total,
            percent=100 * step // total,
            eta_seconds=(total - step) * self.step_seconds,
            update_time=timestamp(NOW + timedelta(seconds=second)),
        )


@dataclass(frozen=True)
class Replay:
    """What became of a run's posts: how many writes, and for how long a figure was out of date."""

    writes: int
    step_age: int  # the longest time for which status had an older step than the last post
    percent_age: int
    news_age: int  # the same of another phase of the trainer, or the first step


def _replayed(run: Run, wait: Wait) -> Replay:
    posts = dict(run.posts())
    written, current, writes, due = _START, _START, 0, 0.0
    outdated = {"step": 0, "percent": 0, "news": 0}
    longest = dict(outdated)
    for second in range(run.seconds):
        if second in posts:
            current = written.model_copy(update={"progress": posts[second]})
            due = second + wait(written, current, NOW + timedelta(seconds=second))
        if current is not written and second >= due:
            written, writes = current, writes + 1
        for figure, age in outdated.items():
            outdated[figure] = age + 1 if _figure(figure, written) != _figure(figure, current) else 0
            longest[figure] = max(longest[figure], outdated[figure])
    return Replay(writes, longest["step"], longest["percent"], longest["news"])


def _figure(name: str, status: Status) -> object:
    progress = status.progress or _NOTHING
    return {"step": progress.step, "percent": progress.percent, "news": (progress.phase, progress.step == 0)}[name]


def _by_policy(before: Status, after: Status, now: datetime) -> float:
    due = seconds_until_due(before, after, None, _WRITE_EVERY, now)
    assert due is not None
    return due


def _at_a_constant_interval(before: Status, after: Status, now: datetime) -> float:
    """The rule before there was a policy: writes of progress are 30 s apart, whatever changes."""
    if before.progress is None:
        return 0.0
    return _WRITE_EVERY - seconds_between(before.progress.update_time or "", now)


@pytest.mark.parametrize(
    ("run", "before", "after"),
    [
        (Run(600, 1), Replay(21, 25, 25, 20), Replay(20, 55, 55, 2)),
        (Run(3600, 1), Replay(121, 25, 25, 20), Replay(110, 35, 0, 2)),
        (Run(36_000, 1), Replay(1201, 25, 25, 20), Replay(611, 55, 0, 2)),
        (Run(36_000, 45), Replay(802, 0, 0, 25), Replay(804, 0, 0, 0)),
    ],
    ids=["10 minutes", "1 hour", "10 hours", "10 hours of long steps"],
)
def test_news_is_fresh_and_costs_no_more_writes_than_a_constant_interval(
    run: Run, before: Replay, after: Replay
) -> None:
    assert _replayed(run, _at_a_constant_interval) == before
    assert _replayed(run, _by_policy) == after
