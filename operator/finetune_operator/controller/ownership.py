"""Compares children in the cache with those in the API server, and proves whose a pod is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_api import names
from finetune_operator.controller.snapshot import JobSnapshot


def fingerprint(snapshot: JobSnapshot) -> tuple[object, ...]:
    """Returns what a decision about a new attempt depends on."""
    children = [*snapshot.attempts, *([snapshot.preflight] if snapshot.preflight else [])]
    return (
        tuple((child.job.uid, child.job.is_finished, child.job.deleting, child.is_live) for child in children),
        tuple(sorted(pod.uid for pod in snapshot.orphaned_pods)),
    )


def may_be_of(pod: Mapping[str, Any], snapshot: JobSnapshot, owners: set[str]) -> bool:
    """Whether a pod may belong to a FineTuneJob: by its controller, by its label, or by its name,
    which can't be changed, while the others can be removed."""
    meta, controller = pod["metadata"], controller_of(pod)
    if controller:
        return controller.get("uid") in owners
    labeled = (meta.get("labels") or {}).get(names.LABEL_JOB_UID) == snapshot.uid
    return labeled or re.fullmatch(rf"{re.escape(snapshot.key[1])}-[0-9]+-[0-9]+-[a-z0-9]+", meta["name"]) is not None


def controller_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the controller of a raw object; empty if it has none."""
    owners = body["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), {})


def is_unwatched(raw: Mapping[str, Any]) -> bool:
    """Whether an object lacks the label that watches select, which anybody can remove."""
    labels = raw["metadata"].get("labels") or {}
    return any(labels.get(key) != value for key, value in names.WATCHED_LABELS.items())
