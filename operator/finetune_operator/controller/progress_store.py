"""Keeps the newest progress report of each job in memory.

Losing it with the process does no harm: the next report has absolute values, and status has the
last ones that were written.
"""

from __future__ import annotations

from finetune_api.messages.progress import Progress
from finetune_operator.core.objects import Report


class ProgressStore:
    """Maps the uid of a FineTuneJob to its newest report."""

    def __init__(self) -> None:
        self._reports: dict[str, Report] = {}

    def get(self, uid: str) -> Report | None:
        """Returns the newest report of a job; None if there is none."""
        return self._reports.get(uid)

    def put(self, uid: str, progress: Progress, time: str) -> bool:
        """Stores a report unless the last one is of a later attempt; `time` is when it came in.

        Returns whether it is news: another phase, the first step, the key or the result, or whether
        the output accepts checkpoints.
        """
        last = self._reports.get(uid)
        if last and last.progress.attempt > progress.attempt:
            return False
        self._reports[uid] = Report(progress, time)
        return last is None or _headline(last.progress) != _headline(progress)

    def forget(self, uid: str) -> None:
        """Removes the report of a job that is gone."""
        self._reports.pop(uid, None)


def _headline(progress: Progress) -> tuple[object, ...]:
    refusal = progress.storing.reason if progress.storing else None
    return progress.attempt, progress.phase, progress.step == 0, progress.signer, progress.artifact, refusal
