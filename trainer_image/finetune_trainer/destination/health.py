"""Follows whether the destination accepts what the job stores, from one upload to the next.

It is pure: times are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_api.messages.progress import Storing
from finetune_trainer.errors import RunError


@dataclass(frozen=True)
class StoreHealth:
    """Holds the newest stored step, and the failures since then.

    `tried` says whether anything has been uploaded, or was refused. `since` is when the first of
    the failures occurred (RFC 3339), `reason` and `message` are those of the last one.
    """

    tried: bool = False
    stored_step: int = 0
    reason: str = ""
    message: str = ""
    since: str | None = None
    failures: int = 0

    def stored(self, step: int) -> StoreHealth:
        """Returns the health after a step was stored."""
        return StoreHealth(tried=True, stored_step=max(step, self.stored_step))

    def failed(self, error: RunError, now: str, consequence: str = "") -> StoreHealth:
        """Returns the health after an upload failed; `consequence` is what the job does now."""
        return replace(
            self,
            tried=True,
            reason=error.reason,
            message=f"{error.message}{consequence and f'; {consequence}'}",
            since=self.since or now,
            failures=self.failures + 1,
        )

    def report(self, step: int) -> Storing | None:
        """Returns what is reported after optimizer step `step`; None before the first upload."""
        if not self.tried:
            return None
        if self.since is None:
            return Storing()
        return Storing(
            reason=self.reason,
            message=self.message,
            since=self.since,
            failures=self.failures,
            steps_at_risk=max(0, step - self.stored_step),
        )
