"""Defines Rivals: who else could own the destination of a job, as the operator knows."""

from __future__ import annotations

from pydantic import Field

from finetune_api import untrusted as u
from finetune_api.base import Model


class Rivals(Model):
    """Lists the jobs whose claims count; others of the same cluster don't exist any more.

    A claim counts as well if it is younger than this list, or of a namespace that isn't watched.
    """

    as_of: u.Time = Field(description="When the list was made, by the API server's clock.")
    uids: tuple[str, ...] = Field(
        default=(), description="FineTuneJobs with the same output, and deleted ones whose pods haven't stopped."
    )
    namespaces: tuple[str, ...] = Field(default=(), description="Those that the operator watches; empty means all.")
