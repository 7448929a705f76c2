"""Puts report.html beside a result, or into the destination of a run that failed. Called by the supervisor on node 0.

A page is for people: where it can't be made or written, that is logged, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.manifest import FileEntry, Manifest, ManifestJob
from finetune_api.reasons import REASONS
from finetune_api.result import Result
from finetune_api.run import RunConfig
from finetune_trainer import digests, report
from finetune_trainer.history import Line
from finetune_trainer.log import Log
from finetune_trainer.place import Place
from finetune_trainer.state import TrainingState

# The destination isn't ours, or doesn't answer.
_NO_PLACE = ("OutputNotFound", "OutputOccupied", "AccessDenied", "CredentialsMissing", "StorageUnavailable")


def cost(phases: Mapping[str, float]) -> dict[str, Any]:
    """Seconds by phase, as the manifest has them."""
    return {
        "wallSeconds": round(sum(phases.values()), 1),
        "phases": {name: round(seconds, 1) for name, seconds in phases.items() if seconds >= 0.05},
    }


def write(
    export: Path,
    run: RunConfig,
    step: int,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, float],
    now: str,
    log: Log,
) -> None:
    """Into the result's finetune folder, before its manifest is made."""

    def file(path: str) -> bytes | None:
        return (export / path).read_bytes() if (export / path).is_file() else None

    try:
        manifest = Manifest(
            kind="adapter" if run.method == "lora" else "model",
            job=ManifestJob(namespace=run.job.namespace, name=run.job.name, uid=run.job.uid, attempt=run.job.attempt),
            step=step,
            created=now,
            files=tuple(
                FileEntry(path=path, size=(export / path).stat().st_size, sha256="")
                for path in digests.relative_files(export)
            ),
            provenance=dict(provenance),
            metrics=dict(metrics),
        )
        (export / names.REPORT_PATH).write_text(report.page(report.read(manifest, file)), encoding="utf-8")
    except Exception as error:
        log.warning("report.html can't be made", detail=f"{type(error).__name__}: {error}")


def write_failure(
    place: Place | None,
    run: RunConfig,
    state: TrainingState,
    lines: tuple[Line, ...],
    result: Result,
    spent: Mapping[str, float],
    now: str,
    log: Log,
) -> None:
    """What is known of a run that failed. The next attempt, or the result, replaces it."""
    if place is None or result.reason in _NO_PLACE:
        return
    reason = REASONS.get(result.reason)
    facts = report.Facts(
        job=run.job.name,
        namespace=run.job.namespace,
        uid=run.job.uid,
        created=now,
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
            "cost": cost(spent),
        },
        metrics={},
        history=lines,
        failure=result,
        hint=reason.hint if reason else "",
        attempt=run.job.attempt,
    )
    try:
        place.write(names.REPORT_PATH, report.page(facts).encode())
    except Exception as error:
        log.warning("report.html isn't written", detail=f"{type(error).__name__}: {error}")
