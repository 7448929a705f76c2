"""Gives pods the certificates by which they recognize the operator."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from finetune_api.messages.run import RunConfig
from finetune_operator.settings import Settings


def with_authority(run: RunConfig, settings: Settings) -> RunConfig:
    """Returns the RunConfig with the authority of the operator's certificate, as it is now.

    Raises OSError if the file can't be read.
    """
    if run.progress is None or not settings.progress.certificate:
        return run
    update = {
        "authority": Path(settings.progress.certificate, "ca.crt").read_text(encoding="ascii"),
        "server_name": settings.progress.server_name or urlsplit(settings.progress.url).hostname or "",
    }
    return run.model_copy(update={"progress": run.progress.model_copy(update=update)})
