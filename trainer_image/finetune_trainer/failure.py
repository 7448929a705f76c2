"""Failed: the one exception that ends an attempt on purpose, with a reason of finetune_api.reasons.

Raised anywhere in the supervisor and in preflight, caught once in `supervisor`. Never wraps an unknown error:
what isn't foreseen stays what it is and shows its traceback.
"""

from __future__ import annotations

from finetune_api.reasons import REASONS


class Failed(Exception):
    """An attempt can't go on. `reason` is a name of REASONS; `message` names the field, the value and the remedy."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        rank: int | None = None,
        exit_code: int | None = None,
        log_tail: str = "",
    ) -> None:
        super().__init__(f"{reason}: {message}")
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is no name of finetune_api.reasons.REASONS")
        self.reason = reason
        self.message = message
        self.rank = rank
        self.exit_code = exit_code
        self.log_tail = log_tail
