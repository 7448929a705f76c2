"""Every hint leads somewhere: what it asks to change exists, and can be changed on the job that
failed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.base import model_in
from finetune_api.crd.transitions import IMMUTABLE, MUTABLE, STOPPED_PHASES, WHILE_STOPPED
from finetune_api.reasons import REASONS, Reason
from finetune_api.resource import FineTuneJob, Spec
from finetune_api.status import FailureStatus

_ROOT = Path(__file__).parents[2]
_SECTIONS = "|".join(IMMUTABLE.values())
_FIELD = re.compile(rf"(?<![\w./-])(?:spec\.)?((?:{_SECTIONS})(?:\.[A-Za-z]\w*)+)")
_NEW_JOB = re.compile("create a (new )?job|choose another output", re.IGNORECASE)
# Read by a person, not changed: they explain what has happened.
_MENTIONED = {"model.revision", "model.uri", "dataset.uri"}
# Names of files and of weights, which look like fields.
_NO_FIELDS = {"checkpoint.step", "evaluation.json", "model.embed_tokens", "model.layers", "model.safetensors",
              "model.safetensors.index.json"}  # fmt: skip


def _exists(path: str) -> bool:
    model = Spec
    for part in path.split("."):
        fields = {field.alias or name: field for name, field in model.model_fields.items()} if model else {}
        if part not in fields:
            return False
        model = model_in(fields[part].annotation)  # type: ignore[assignment]
    return True


def _may_change(path: str) -> bool:
    section, field, *_ = path.split(".")
    return (section, field) in MUTABLE | WHILE_STOPPED


@pytest.mark.parametrize("reason", REASONS.values(), ids=lambda reason: reason.name)
def test_a_hint_names_only_fields_that_exist_and_that_can_be_changed(reason: Reason) -> None:
    advice = {match[1] for match in _FIELD.finditer(_NEW_JOB.split(reason.hint)[0])}
    assert {path for path in advice - _MENTIONED if not _may_change(path)} == set()
    assert {match[1] for match in _FIELD.finditer(reason.hint) if not _exists(match[1])} == set()
    for name in re.findall(r"\bfailure\.(\w+)", reason.hint):
        assert name in {field.alias or key for key, field in FailureStatus.model_fields.items()}


def test_what_a_hint_asks_for_may_be_changed_in_the_phase_in_which_it_is_read() -> None:
    assert "Failed" in STOPPED_PHASES
    assert ("runPolicy", "retry") in MUTABLE


@pytest.mark.parametrize("reason", REASONS.values(), ids=lambda reason: reason.name)
def test_a_hint_is_as_true_of_a_job_without_restarts_as_of_one_that_is_restarted(reason: Reason) -> None:
    """It is in status.failure in both cases, and only the budget says which one it is."""
    assert not re.search(r"\bis (retried|restarted)\b|\bthe restart trains\b", reason.hint)


@pytest.mark.parametrize("reason", [r for r in REASONS.values() if r.cause == "user"], ids=lambda reason: reason.name)
def test_a_mistake_says_how_the_job_goes_on(reason: Reason) -> None:
    hint = reason.hint
    assert "runPolicy.retry" in hint or _NEW_JOB.search(hint)


def _sentences() -> Iterator[tuple[str, str]]:
    for folder in ("operator", "trainer_image"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                    yield f"{path.relative_to(_ROOT)}:{node.lineno}", node.value


def test_every_field_in_a_sentence_of_the_sources_exists() -> None:
    """Messages, descriptions and log lines name fields, which may be renamed one day."""
    assert FineTuneJob.model_fields["spec"].annotation is Spec
    named = [(place, match[1]) for place, text in _sentences() for match in _FIELD.finditer(text)]
    assert len(named) > 300
    unknown = [(place, path) for place, path in named if path not in _NO_FIELDS and not _exists(path)]
    assert [entry for entry in unknown if not entry[1].endswith("_")] == []
