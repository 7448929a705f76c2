"""The same tables on a real API server: it must accept and refuse what pydantic does, and name the
same field."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from api.support.api_server import JOBS, Answer, Server
from api.support.spec_cases import CASES, EQUAL, MINIMAL, TRANSITIONS, WHILE_STOPPED, Case, changed
from conftest import ControlPlane
from finetune_api.crd.schema import JsonSchema, root_schema
from finetune_api.crd.transitions import STOPPED_PHASES
from finetune_api.resource import parse
from finetune_api.status import Phase

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="session")
def server(crd: ControlPlane) -> Server:
    return Server(crd.kubeconfig)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_api_server_agrees_with_pydantic(case: Case, server: Server) -> None:
    answer = server.create(case.body)
    assert answer.accepted is case.valid, answer.message
    if not case.valid:
        assert _names(answer, str(case.field)), answer.body


def _names(answer: Answer, field: str) -> bool:
    """Return whether a refusal is about a field; strict decoding names it only in the message."""
    return any(name.startswith(field) for name in answer.fields) or field in answer.message


@pytest.mark.parametrize(("name", "before", "change", "field"), TRANSITIONS, ids=[row[0] for row in TRANSITIONS])
def test_the_api_server_refuses_changes_of_immutable_fields(
    name: str,
    before: tuple[tuple[str, Any], ...],
    change: tuple[tuple[str, Any], ...],
    field: str | None,
    server: Server,
) -> None:
    old = changed(MINIMAL, ("metadata.name", "t-" + name.lower().replace(" ", "-")), *before)
    created = server.request("POST", JOBS, old, fieldValidation="Strict")
    assert created.accepted, created.message
    try:
        new = changed(old, *change)
        new["metadata"]["resourceVersion"] = created.body["metadata"]["resourceVersion"]
        answer = server.replace(new)
        assert answer.accepted is (field is None), answer.message
        assert field is None or any(named == field for named in answer.fields), answer.body
        assert field is None or re.search("create a new FineTuneJob instead|can only be raised", answer.message)
    finally:
        server.request("DELETE", f"{JOBS}/{old['metadata']['name']}")


@pytest.fixture(scope="module")
def job_in_phase(server: Server) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Return a function that stores a job in a phase, and returns what a client would send."""
    stored: set[str] = set()

    def store(phase: str) -> dict[str, Any]:
        name = f"phase-{phase.lower()}"
        old = changed(MINIMAL, ("metadata.name", name))
        if name not in stored:
            stored.add(name)
            assert server.request("POST", JOBS, old).accepted
            merge = "application/merge-patch+json"
            answer = server.request("PATCH", f"{JOBS}/{name}/status", {"status": {"phase": phase}}, merge)
            assert answer.accepted, answer.message
        body = server.request("GET", f"{JOBS}/{name}").body
        return changed(old, ("metadata.resourceVersion", body["metadata"]["resourceVersion"]))

    yield store
    for name in stored:
        server.request("DELETE", f"{JOBS}/{name}")


@pytest.mark.parametrize("phase", get_args(Phase))
def test_what_does_not_change_the_computation_may_change_while_no_pods_run(
    phase: str, server: Server, job_in_phase: Callable[[str], dict[str, Any]]
) -> None:
    old = job_in_phase(phase)
    for field, value in WHILE_STOPPED:
        answer = server.replace(changed(old, (field, value)))
        assert answer.accepted is (phase in STOPPED_PHASES), f"{field}: {answer.message}"
        assert answer.accepted or f"spec.{field} can't be changed while pods run" in answer.message
        suspending = server.replace(changed(old, (field, value), ("runPolicy.suspend", True)))
        assert suspending.accepted, suspending.message
    for field, value in (("training.seed", 1), ("dataset.packing", False), ("output.uri", "s3://models/other")):
        assert not server.replace(changed(old, (field, value))).accepted


@pytest.mark.parametrize(("field", "before", "after"), EQUAL)
def test_equal_quantities_are_equal_even_while_pods_run(field: str, before: Any, after: Any, server: Server) -> None:
    old = changed(MINIMAL, ("metadata.name", "spelling"), (field, before))
    assert server.request("POST", JOBS, old).accepted
    try:
        merge = "application/merge-patch+json"
        body = server.request("PATCH", f"{JOBS}/spelling/status", {"status": {"phase": "Running"}}, merge).body
        version = ("metadata.resourceVersion", body["metadata"]["resourceVersion"])
        answer = server.replace(changed(old, version, (field, after)))
        assert answer.accepted, answer.message
    finally:
        server.request("DELETE", f"{JOBS}/spelling")


def test_the_queue_can_be_changed_only_while_suspended(server: Server) -> None:
    for suspended in (False, True):
        old = changed(MINIMAL, ("metadata.name", "queued"), ("runPolicy.suspend", suspended))
        created = server.request("POST", JOBS, old)
        try:
            new = changed(old, ("runPolicy.queueName", "team-a"))
            new["metadata"]["resourceVersion"] = created.body["metadata"]["resourceVersion"]
            answer = server.replace(new)
            assert answer.accepted is suspended
            assert suspended or "can only be changed while" in answer.message
        finally:
            server.request("DELETE", f"{JOBS}/queued")


def test_defaults_are_the_same_on_both_sides(server: Server) -> None:
    answer = server.create(MINIMAL)
    assert answer.body["spec"] == parse(MINIMAL).spec.to_json()


@pytest.mark.parametrize("case", [case for case in CASES if case.valid], ids=lambda case: case.id)
def test_the_api_server_stores_what_pydantic_reads(case: Case, server: Server) -> None:
    stored = server.create(case.body).body
    assert parse(stored).spec == parse(case.body).spec


def test_nan_is_not_a_number_in_json(server: Server) -> None:
    body = changed(MINIMAL, ("training.learningRate", float("nan")))
    assert server.create(body).code == 400
    with pytest.raises(ValidationError, match="learningRate"):
        parse(body)


def test_a_duplicate_key_is_refused(server: Server) -> None:
    text = json.dumps(MINIMAL).replace('"type": "lora"', '"type": "lora", "type": "lora"')
    answer = server.create(text)
    assert answer.code == 400
    assert 'duplicate field "spec.method.type"' in answer.message


# Every field × the values that people and fuzzers put there.
_ODD: tuple[Any, ...] = (
    None, "", " ", "x", "auto", "none", "1", "ünïcode", "a" * 2000, True, False, 0, 1, -1, 2, 16, 65, 0.5, 1.5, -0.5,
    2.0, 2**31, 2**53, 2**63, 1e300, [], [""], ["a"], [1], {}, {"a": "b"}, {"name": "x"}, {"uri": "s3://data/x"},
)  # fmt: skip


def _fields(schema: JsonSchema, path: str) -> Iterator[tuple[str, JsonSchema]]:
    for key, field in schema.get("properties", {}).items():
        yield f"{path}{key}", field
        yield from _fields(field, f"{path}{key}.")


def _values(field: JsonSchema) -> Iterator[Any]:
    yield from _ODD
    yield from field.get("enum", ())
    for edge in ("minimum", "maximum"):
        if edge in field:
            yield from (field[edge] - 1, field[edge], field[edge] + 1, field[edge] + 0.001, field[edge] - 0.001)
    if "maxLength" in field:
        yield from ("a" * field["maxLength"], "a" * (field["maxLength"] + 1))


def as_go_writes(value: Any) -> Any:
    """Return a value as kubectl and every Go client write it: 2.0 as 2. Only hand-made JSON has the
    former."""
    if isinstance(value, dict):
        return {key: as_go_writes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_go_writes(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


SPEC_FIELDS = tuple(_fields(root_schema()["properties"]["spec"], ""))


@pytest.mark.parametrize("section", sorted({path.split(".")[0] for path, _ in SPEC_FIELDS}))
def test_both_agree_on_any_value_in_any_field(section: str, server: Server) -> None:
    differ = []
    for path, field in ((path, field) for path, field in SPEC_FIELDS if path.split(".")[0] == section):
        for value in _values(field):
            body = changed(MINIMAL, (path, value))
            try:
                parse(body)
                accepted = True
            except ValidationError:
                accepted = False
            answer = server.create(as_go_writes(body))
            if answer.accepted is not accepted:
                differ.append(f"{path}={value!r}: pydantic {accepted}, API server {answer.accepted} {answer.message}")
    assert not differ, "\n".join(itertools.islice(differ, 20))


def test_kubectl_explains_a_field(crd: ControlPlane) -> None:
    text = crd.kubectl("explain", "ftj.spec.training.learningRate")
    assert "Peak learning rate" in text
    text = crd.kubectl("explain", "finetunejob.spec.method.lora")
    assert "Settings of the adapters" in text
    assert "targetModules" in text


def test_kubectl_shows_the_columns(crd: ControlPlane, server: Server) -> None:
    crd.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(changed(MINIMAL, ("metadata.name", "columns"))))
    try:
        status = {
            "phase": "Running", "reason": "Evicted", "gpus": 16, "restartsTotal": 2, "message": "m" * 110,
            "progress": {"step": 50, "totalSteps": 100, "percent": 50, "trainLoss": 1.25, "eta": "90s"},
            "conditions": [{"type": "Complete", "status": "False", "reason": "Running", "message": "",
                            "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}],
        }  # fmt: skip
        answer = server.request(
            "PATCH", f"{JOBS}/columns/status", {"status": status}, content="application/merge-patch+json"
        )
        assert answer.accepted, answer.message
        heading, row = crd.kubectl("get", "ftj", "columns", "-o", "wide").splitlines()
        titles = ["NAME", "PHASE", "REASON", "STEP", "%", "LOSS", "ETA", "GPUS", "RESTARTS", "AGE"]
        assert heading.split() == [*titles, "MESSAGE"]
        assert row.split()[1:9] == ["Running", "Evicted", "50", "50", "1.25", "90s", "16", "2"]
        assert max(len(line) for line in (heading, row)) <= 220
        narrow = crd.kubectl("get", "ftj", "columns").splitlines()
        assert narrow[0].split() == titles
        assert max(len(line) for line in narrow) <= 160
        assert "columns" in crd.kubectl("get", "ml")
    finally:
        crd.kubectl("delete", "ftj", "columns")


def test_status_fields_that_the_schema_does_not_know_are_reported(crd: ControlPlane, server: Server) -> None:
    crd.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(changed(MINIMAL, ("metadata.name", "strict"))))
    try:
        answer = server.request(
            "PATCH", f"{JOBS}/strict/status", {"status": {"color": "red"}},
            content="application/merge-patch+json", fieldValidation="Strict",
        )  # fmt: skip
        assert 'unknown field "status.color"' in answer.message
    finally:
        crd.kubectl("delete", "ftj", "strict")
