"""reports: the newest progress of each job, in memory. Written by progress, read by reconcile and metrics.

Lost with the process, which does no harm: the next post has absolute values, and status holds the last ones.
"""

from __future__ import annotations

from finetune_api.progress import Progress
from finetune_operator.observe import Report


class Reports:
    """By uid of the FineTuneJob."""

    def __init__(self) -> None:
        self._reports: dict[str, Report] = {}

    def get(self, uid: str) -> Report | None:
        return self._reports.get(uid)

    def put(self, uid: str, progress: Progress, time: str) -> bool:
        """Takes it unless it is of an earlier attempt than the last one. Returns whether its phase is new."""
        known = self._reports.get(uid)
        if known and known.progress.attempt > progress.attempt:
            return False
        self._reports[uid] = Report(progress, time)
        return known is None or known.progress.phase != progress.phase or known.progress.attempt != progress.attempt

    def forget(self, uid: str) -> None:
        self._reports.pop(uid, None)
