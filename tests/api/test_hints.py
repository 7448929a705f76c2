"""Every hint leads somewhere: what it asks to change can be changed on the job that failed."""

from __future__ import annotations

import re

import pytest

from finetune_api.crd.transitions import IMMUTABLE, MUTABLE, WHILE_STOPPED
from finetune_api.reasons import REASONS, Reason

_FIELD = re.compile(rf"\b({'|'.join(IMMUTABLE.values())})\.([a-z][A-Za-z]*)")
_NEW_JOB = re.compile("create a (new )?job|choose another output", re.IGNORECASE)
# Read by the program, not changed: they explain what has happened.
_MENTIONED = {("training", "maxSkippedSteps"), ("model", "revision"), ("model", "uri"), ("dataset", "uri")}


@pytest.mark.parametrize("reason", REASONS.values(), ids=lambda reason: reason.name)
def test_a_hint_names_only_fields_that_can_be_changed(reason: Reason) -> None:
    hint = reason.hint
    before_new_job = _NEW_JOB.split(hint)[0]
    fields = {(match[1], match[2]) for match in _FIELD.finditer(before_new_job)}
    assert fields - _MENTIONED <= MUTABLE | WHILE_STOPPED | {("output", "merge")}


@pytest.mark.parametrize("reason", [r for r in REASONS.values() if r.cause == "user"], ids=lambda reason: reason.name)
def test_a_mistake_says_how_the_job_goes_on(reason: Reason) -> None:
    hint = reason.hint
    assert "runPolicy.retry" in hint or _NEW_JOB.search(hint)
