"""Defines Rivals: who else could own the destination of a job, as the operator knows."""

from __future__ import annotations

import hashlib

from pydantic import Field

from finetune_api import untrusted as u
from finetune_api.base import Model


class Rivals(Model):
    """Lists the jobs whose claims count; others of the same cluster don't exist any more.

    A claim counts as well if it is younger than this list, or of a namespace that isn't watched.
    """

    as_of: u.Time = Field(description="When the list was made, by the API server's clock.")
    digests: tuple[str, ...] = Field(
        default=(),
        description="Of the uids of FineTuneJobs with the same output, and of deleted ones whose pods haven't stopped.",
    )
    namespaces: tuple[str, ...] = Field(default=(), description="Those that the operator watches; empty means all.")

    def include(self, uid: str) -> bool:
        """Whether a FineTuneJob is one of them."""
        return digest_of(uid) in self.digests


def digest_of(uid: str) -> str:
    """Returns what stands for a uid where other tenants can read it, in 32 hexadecimal digits."""
    return hashlib.sha256(uid.encode()).hexdigest()[:32]
