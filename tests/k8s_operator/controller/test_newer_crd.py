"""An operator that is older than its CRD, as during an upgrade, leaves jobs with new fields
alone."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.controller import reconcile
from finetune_operator.controller.reconcile import Reconciler
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.workqueue import WorkQueue
from finetune_operator.settings import Settings
from k8s_operator.support.kubelet_stand_in import job_body

_KEY = ("team", "modern")


class _StatusOnly:
    """A client that records the statuses written, and has no other operation."""

    def __init__(self) -> None:
        self.statuses: list[dict[str, Any]] = []

    async def apply_status(self, namespace: str, name: str, version: str, status: dict[str, Any]) -> dict[str, Any]:
        self.statuses.append(status)
        return {**_body(status), "metadata": {**_body()["metadata"], "resourceVersion": str(int(version) + 1)}}


def _body(status: dict[str, Any] | None = None) -> dict[str, Any]:
    body = job_body("modern", training={"sharpness": 0.1})
    body["metadata"] |= {"namespace": "team", "uid": "u1", "resourceVersion": "7", "generation": 1}
    return {**body, "status": status or {"phase": "Running", "attempt": 1}}


@pytest.fixture
def client() -> _StatusOnly:
    return _StatusOnly()


async def _reconciled(client: Any, body: dict[str, Any]) -> ControllerState:
    state = ControllerState(WorkQueue())
    state.cache.put_body(body)
    settings = Settings.model_validate({"trainerImage": "example.test/trainer:1"})
    await Reconciler(client, state, settings, recorder=None).reconcile(_KEY)  # type: ignore[arg-type]
    return state


async def test_nothing_is_written_in_the_first_minute(client: _StatusOnly) -> None:
    await _reconciled(client, _body())
    assert client.statuses == []


async def test_afterwards_the_status_names_the_field_and_the_phase_remains(
    client: _StatusOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "_UPGRADE_SECONDS", 0.0)
    await _reconciled(client, _body())
    (status,) = client.statuses
    assert status["phase"] == "Running"
    assert "failure" not in status
    assert status["message"].startswith("spec.training.sharpness: this operator doesn't know the field")
    reasons = {condition["type"]: (condition["status"], condition["reason"]) for condition in status["conditions"]}
    assert reasons["Reconciling"] == ("True", "OperatorTooOld")
    assert reasons["Failed"][0] == "False"
    await _reconciled(client, _body(status))
    assert len(client.statuses) == 1


async def test_a_wrong_value_still_fails_the_job(client: _StatusOnly) -> None:
    body = _body()
    body["spec"]["training"]["epochs"] = "many"
    await _reconciled(client, body)
    (status,) = client.statuses
    assert (status["phase"], status["failure"]["reason"]) == ("Failed", "InvalidSpec")
