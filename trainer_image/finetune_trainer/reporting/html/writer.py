"""Writes report.html next to a result, or into the output of a run that failed.

The page is for people: if it can't be made or written, that is logged, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.messages.run import RunConfig
from finetune_api.reasons import REASONS
from finetune_trainer.log import Log
from finetune_trainer.manifest import Contents, build_manifest, now_rfc3339
from finetune_trainer.reporting.history import Line
from finetune_trainer.reporting.html import page
from finetune_trainer.reporting.run_state import RunState
from finetune_trainer.storage.base import Storage

# With these reasons the output belongs to another job, or can't be reached.
_UNWRITABLE = ("OutputNotFound", "OutputOccupied", "AccessDenied", "CredentialsMissing", "StorageUnavailable")


@dataclass(frozen=True)
class FailedRun:
    """Holds what is known of a run that failed. `phase_seconds` is the time spent in each phase."""

    result: Result
    state: RunState
    history: tuple[Line, ...]
    phase_seconds: Mapping[str, float]


def cost(phases: Mapping[str, float]) -> dict[str, Any]:
    """Returns the time spent, in seconds, in total and by phase, in the form of the manifest."""
    return {
        "wallSeconds": round(sum(phases.values()), 1),
        "phases": {name: round(seconds, 1) for name, seconds in phases.items() if seconds >= 0.05},
    }


def write(export: Path, contents: Contents, log: Log) -> None:
    """Writes the page into the result's finetune folder, before its manifest is made."""

    def file(path: str) -> bytes | None:
        """Returns the content of a file of the result, or None."""
        return (export / path).read_bytes() if (export / path).is_file() else None

    try:
        manifest = build_manifest(export, contents, digests=False)
        (export / names.REPORT_PATH).write_text(page.page(page.read(manifest, file)), encoding="utf-8")
    except Exception as error:
        log.warning("report.html can't be made", detail=f"{type(error).__name__}: {error}")


def write_failure(storage: Storage | None, run: RunConfig, failed: FailedRun, log: Log) -> None:
    """Writes a page about a run that failed.

    The page of the next attempt or of the result replaces it.
    """
    result, state = failed.result, failed.state
    if storage is None or result.reason in _UNWRITABLE:
        return
    reason = REASONS.get(result.reason)
    data = page.ReportData(
        job=run.job.name,
        namespace=run.job.namespace,
        uid=run.job.uid,
        created=now_rfc3339(),
        step=state.step,
        provenance={
            "model": {"uri": run.model.location.display},
            "configuration": run.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"progress"}),
            "decisions": {d.topic: {"choice": d.choice, "reason": d.reason} for d in state.decisions},
            "plan": state.plan.model_dump(mode="json", by_alias=True) if state.plan else {},
            "image": run.provenance.image,
            "operatorVersion": run.provenance.operator_version,
            "specDigest": run.provenance.spec_digest,
            "seed": run.training.seed,
            "cost": cost(failed.phase_seconds),
        },
        metrics={},
        history=failed.history,
        failure=result,
        hint=reason.hint if reason else "",
        attempt=run.job.attempt,
    )
    try:
        storage.write(names.REPORT_PATH, page.page(data).encode())
    except Exception as error:
        log.warning("report.html can't be written", detail=f"{type(error).__name__}: {error}")
