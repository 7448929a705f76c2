"""What a process that reads untrusted files tells the supervisor, one JSON object per line."""

from __future__ import annotations

from typing import Literal

from finetune_api.base import Model
from finetune_api.messages.run import RunConfig
from finetune_api.status import DataStatus
from finetune_trainer.model_folder import Capacity

Task = Literal["rows", "tokens"]


class Order(Model):
    """Says what to read, and how much memory that may take. It is written to stdin."""

    run: RunConfig
    memory_bytes: int
    capacity: Capacity | None = None


class Step(Model):
    """Reports progress. A message without fields only shows that the process isn't stuck.

    `report` is a sentence for the log. If the process ends without a last word, `reason` and
    `subject` say what it was reading: the reason that stands for it, and its name.
    """

    report: str = ""
    reason: str = ""
    subject: str = ""


class End(Model):
    """Is the last message: the result, or the reason and the message of a RunError."""

    end: Literal[True] = True
    reason: str = ""
    message: str = ""
    counts: str = ""
    data: DataStatus | None = None
