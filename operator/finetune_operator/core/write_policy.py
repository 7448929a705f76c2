"""Decides when a status has to be written.

Whether two statuses differ is decided here, so that nothing is written when nothing has changed.
The clock is an argument, and there is no I/O.
"""

from __future__ import annotations

from datetime import datetime

from finetune_api.status import CONDITION_STALLED, CONDITION_SUSPENDED, ProgressStatus, Status
from finetune_operator.core.objects import seconds_between

# A change that isn't urgent waits this long, so that one write includes a change that follows
# immediately.
SETTLE_SECONDS = 2.0
# A new message about the same condition waits this long: a kubelet repeats itself with different
# port numbers.
MESSAGE_SETTLE_SECONDS = 60.0
# News is written this soon after the last progress: another phase of the trainer, the first step,
# the key of a pod, which the next one needs.
NEWS_SECONDS = 3.0

_URGENT_PHASES = ("Succeeded", "Failed", "Suspended")
# Phases of the trainer in their order. A change back is no news: training and evaluating alternate.
# Nor is the end, which a pod's own end follows.
_ORDER = {"fetching": 1, "checking": 1, "loading": 2, "tokenizing": 3, "training": 4, "evaluating": 4, "saving": 5,
          "uploading": 6, "done": 6}  # fmt: skip


def seconds_until_due(
    before: Status, after: Status, pending: float | None, write_every: float, now: datetime
) -> float | None:
    """Returns how many seconds the new status may wait: None if it is the same, 0 if it is due.

    `pending` is the number of seconds since it first differed from the written one; `write_every`
    is the interval, in seconds, between writes that change only the progress.
    """
    if before == after:
        return None
    if _without_progress(before) == _without_progress(after):
        return _until_progress_is_due(before, after, write_every, now)
    if _is_urgent(before, after):
        return 0.0
    settle = MESSAGE_SETTLE_SECONDS if _without_messages(before) == _without_messages(after) else SETTLE_SECONDS
    return max(0.0, settle - (pending or 0.0))


def shortest_interval(write_every: float) -> float:
    """Returns the seconds between two writes of progress at the beginning of a run."""
    return write_every / 3


def _until_progress_is_due(before: Status, after: Status, write_every: float, now: datetime) -> float:
    """Returns how many seconds a change of progress may wait.

    Somebody watches a job in its first minutes, so progress is written often then, and less often
    later: the interval is a fifth of the run's age, at least a third of `write_every` and at most
    twice as long. A figure that changes less often than `write_every` needn't wait for that: it is
    written after the shortest interval. In the long run, this needs no more writes than a constant
    interval of `write_every`.
    """
    if before.progress is None or before.progress.update_time is None:
        return 0.0
    age = seconds_between(before.progress.update_time, now)
    if _is_news(before.progress, after.progress) or before.signers != after.signers:
        return max(0.0, NEWS_SECONDS - age)
    if _has_rare_change(before.progress, after.progress, write_every):
        return max(0.0, shortest_interval(write_every) - age)
    run = seconds_between(before.start_time, now) if before.start_time else 0.0
    interval = min(max(run / 5, shortest_interval(write_every)), 2 * write_every)
    return max(0.0, interval - age)


def _has_rare_change(before: ProgressStatus, after: ProgressStatus | None, write_every: float) -> bool:
    """Whether a figure has changed that takes at least `write_every` seconds from one change to the
    next: the step in a run with long steps, the whole percent in a long run, and the last step."""
    if after is None or after.eta_seconds is None:
        return False
    steps, percents = after.total_steps - after.step, 100 - after.percent
    step_is_long = after.eta_seconds >= steps * write_every
    percent_is_long = after.eta_seconds >= percents * write_every
    return (step_is_long and before.step != after.step) or (percent_is_long and before.percent != after.percent)


def _is_news(before: ProgressStatus, after: ProgressStatus | None) -> bool:
    if after is None:
        return False
    if before.attempt != after.attempt:
        return True
    later = _ORDER.get(after.phase, 0) > _ORDER.get(before.phase, 0)
    return later or (before.step == 0 and after.step > 0)


def _is_urgent(before: Status, after: Status) -> bool:
    """Whether a job ended, restarted, stalled or was suspended: status reports it immediately."""
    return (
        (after.phase in _URGENT_PHASES and before.phase != after.phase)
        or before.restarts != after.restarts
        or _suspension_reason(before) != _suspension_reason(after)
        or _is_stalled(before) != _is_stalled(after)
    )


def _is_stalled(status: Status) -> bool:
    return any(c.type == CONDITION_STALLED and c.status == "True" for c in status.conditions)


def _suspension_reason(status: Status) -> str:
    return next((c.reason for c in status.conditions if c.type == CONDITION_SUSPENDED), "")


def _without_progress(status: Status) -> Status:
    """Returns a status without all that a progress report changes."""
    message = "" if status.phase == "Running" else status.message  # else a condition has it as well
    return status.model_copy(
        update={
            "message": message,
            "progress": None,
            "checkpoint": None,
            "evaluation": None,
            "model": None,
            "data": None,
            "signers": (),
        }
    )


def _without_messages(status: Status) -> Status:
    without = tuple(c.model_copy(update={"message": ""}) for c in status.conditions)
    return _without_progress(status).model_copy(update={"message": "", "conditions": without})
