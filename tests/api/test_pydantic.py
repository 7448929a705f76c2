"""The contract checked by pydantic alone: the table of cases, transitions, the messages of
refusals, and the generated files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from api.support.spec_cases import ABSENT, CASES, EQUAL, MINIMAL, TRANSITIONS, Case, changed
from finetune_api import generate, scalars
from finetune_api.crd.transitions import (
    GPU_MESSAGE,
    QUEUE_NAME_MESSAGE,
    RETRY_MESSAGE,
    immutable_message,
    is_equal,
    is_immutable,
)
from finetune_api.errors import describe
from finetune_api.resource import FineTuneJob, Spec, parse
from finetune_operator.core.plan import PlanError, plan
from finetune_operator.settings import Settings


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_pydantic_accepts_what_is_valid_and_names_the_field_that_is_not(case: Case) -> None:
    if case.valid:
        assert isinstance(parse(case.body), FineTuneJob)
        return
    with pytest.raises(ValidationError) as refusal:
        parse(case.body)
    assert any(line.startswith(str(case.field)) for line in describe(refusal.value)), describe(refusal.value)


@pytest.mark.parametrize(
    ("before", "change", "field"), [row[1:] for row in TRANSITIONS], ids=[r[0] for r in TRANSITIONS]
)
def test_a_transition_is_refused_by_the_name_of_the_field(
    before: tuple[tuple[str, Any], ...], change: tuple[tuple[str, Any], ...], field: str | None
) -> None:
    old = changed(MINIMAL, *before)
    new = changed(old, *change)
    errors = _transition_errors(parse(old).spec, parse(new).spec)
    assert bool(errors) is (field is not None)
    assert field is None or any(error.startswith(f"{field} ") for error in errors)


def _transition_errors(old: Spec, new: Spec) -> tuple[str, ...]:
    """Returns why the API server would refuse to turn `old` into `new`; empty if it would not."""
    errors = []
    for name, spec_field in Spec.model_fields.items():
        section = spec_field.alias or name
        before, after = getattr(old, name), getattr(new, name)
        errors += [
            immutable_message(section, field.alias or attribute)
            for attribute, field in type(before).model_fields.items()
            if is_immutable(section, field.alias or attribute)
            and getattr(before, attribute) != getattr(after, attribute)
        ]
    if new.run_policy.retry < old.run_policy.retry:
        errors.append(RETRY_MESSAGE)
    if (new.resources.gpu is None) != (old.resources.gpu is None):
        errors.append(GPU_MESSAGE)
    if new.run_policy.queue_name != old.run_policy.queue_name and not old.run_policy.suspend:
        errors.append(QUEUE_NAME_MESSAGE)
    return tuple(errors)


@pytest.mark.parametrize(("field", "before", "after"), EQUAL)
def test_equal_quantities_are_equal(field: str, before: Any, after: Any) -> None:
    section, _, key = field.partition(".")
    values = [parse(changed(MINIMAL, (field, value))).spec.to_json()[section][key] for value in (before, after)]
    assert is_equal(section, key, *values)
    other = {"hugepages-2Mi": "3Gi"} if isinstance(before, dict) else "7Gi"
    assert not is_equal(section, key, values[0], other)


_CHANGES = [change for case in CASES for change in case.changes]
_STRANGE = st.sampled_from([
    None, True, -1, 0, 2**70, 1e308, -0.0, "", " ", "\x00", "é" * 300, [], [[]], {}, {"": ""}, [None], {"a": [1]},
])  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from([path for path, _ in _CHANGES]),
            _STRANGE | st.sampled_from([value for _, value in _CHANGES]),
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=400, deadline=None)
def test_any_value_in_any_field_is_accepted_or_refused_by_name(changes: list[tuple[str, Any]]) -> None:
    try:
        body = changed(MINIMAL, *changes)
    except (TypeError, KeyError, AttributeError, ValueError, IndexError):
        return  # a change below a value that another change set
    try:
        plan(parse(body), Settings())
    except ValidationError as refusal:
        assert all(  # noqa: PT017
            line.split(":")[0].startswith(("spec", "metadata", "kind", "apiVersion")) for line in describe(refusal)
        )
    except PlanError as refusal:
        assert str(refusal)  # noqa: PT017


def test_ids_are_unique() -> None:
    ids = [case.id for case in CASES]
    assert sorted(set(ids)) == sorted(ids)


def test_a_refusal_shows_the_value() -> None:
    with pytest.raises(ValidationError) as refusal:
        parse(changed(MINIMAL, ("method.lora.rank", 0)))
    (line,) = describe(refusal.value)
    assert line == "spec.method.lora.rank: Input should be greater than or equal to 1 (got 0)"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("model.uri", "org/model"), "spec.model.uri: must be hf://owner/name, s3://bucket/prefix, gs://bucket/prefix, "
         "az://container/prefix, pvc://claim/path or volume://name/path, without spaces, ? or # (got 'org/model')"),
        (("color", "red"), "spec.color: is not a field of this version; check the spelling"),
        (("training.learning_rate", 1e-4), "spec.training.learning_rate: is not a field of this version; check the "
         "spelling (did you mean learningRate?)"),
        (("dataset.maxSeqLength", 9), "spec.dataset.maxSeqLength: is not a field of this version; check the "
         "spelling (did you mean maxSequenceLength?)"),
        (("output", ABSENT), "spec.output: is required"),
        (("resources.cpu", "four"), "spec.resources.cpu: must be auto, or a quantity such as 16, 500m or 128Gi "
         "(got 'four')"),
    ],
    ids=["pattern", "unknown", "snake case", "a similar name", "missing", "quantity"],
)  # fmt: skip
def test_a_refusal_describes_the_expected_value(change: tuple[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        parse(changed(MINIMAL, change))
    assert describe(refusal.value) == (line,)


def test_every_pattern_has_a_description() -> None:
    patterns = {value for name, value in vars(scalars).items() if name.endswith("_PATTERN")}
    assert patterns == set(scalars.PATTERN_MESSAGES)


def test_a_refusal_lists_every_broken_rule() -> None:
    with pytest.raises(ValidationError) as refusal:
        parse(changed(MINIMAL, ("training", {"epochs": 1, "maxSteps": 1, "minLearningRateRatio": 0.1})))
    assert describe(refusal.value) == (
        "spec.training.maxSteps: must not be set together with epochs",
        "spec.training.minLearningRateRatio: needs scheduler linear, cosine or wsd",
    )


def test_every_generated_file_is_up_to_date() -> None:
    assert generate.stale(Path(__file__).parents[2]) == [], f"run {generate.COMMAND}"


def test_the_check_fails_on_a_stale_file_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "operator" / "finetune_api").mkdir(parents=True)
    shutil.copytree(Path(__file__).parents[2] / "examples", tmp_path / "examples")
    assert generate.main(["--root", str(tmp_path), "--check"]) == 1
    assert "docs/reference.md is out of date" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()
    assert generate.main(["--root", str(tmp_path)]) == 0
    assert generate.main(["--root", str(tmp_path), "--check"]) == 0
