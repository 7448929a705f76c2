"""Builders of observed states that read like a sentence: an attempt whose second pod ran out of
memory, a suspended job."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.resource import FineTuneJob, parse
from finetune_api.status import Restarts, Status
from finetune_operator.core.objects import Attempt, ChildJob, Observed, Pod, Termination
from k8s_operator.support.kubelet_stand_in import job_body

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
BEFORE = "2026-01-02T03:00:00Z"


def a_job(status: Status | None = None, generation: int = 1, **sections: Any) -> FineTuneJob:
    body = job_body("train", **sections)
    body["metadata"] |= {"namespace": "team", "uid": "job-uid", "generation": generation}
    job = parse(body)
    return job.model_copy(update={"status": status}) if status else job


def a_pod(index: int = 0, phase: str = "Running", **fields: Any) -> Pod:
    pod = Pod(
        namespace="team",
        name=f"train-1-{index}",
        uid=f"pod-{index}",
        version=1,
        job_uid="child-1",
        owner_uid="job-uid",
        index=index,
        phase=phase,
        created=BEFORE,
        started=phase == "Running",
    )
    return replace(pod, **fields)


def a_dead_pod(index: int, exit_code: int, result: Result | None = None, at: str = BEFORE, **fields: Any) -> Pod:
    reason = fields.pop("reason", "Error")
    return a_pod(index, "Failed", termination=Termination(exit_code, reason, finished_at=at), result=result, **fields)


def a_done_pod(index: int = 0, result: Result | None = None) -> Pod:
    return a_pod(index, "Succeeded", termination=Termination(0, "Completed", finished_at=BEFORE), result=result)


def an_attempt(number: int = 1, *pods: Pod, restarts: Restarts | None = None, **fields: Any) -> Attempt:
    job = ChildJob(
        namespace="team",
        name=f"train-{number}",
        uid=f"child-{number}",
        version=1,
        resource_version="1",
        owner_uid="job-uid",
        role=names.ROLE_TRAINER,
        attempt=number,
        created=BEFORE,
        expected_pods=max(1, len(pods)),
        restarts=restarts or Restarts(),
    )
    return Attempt(replace(job, **fields), pods)


def a_check(*pods: Pod, **fields: Any) -> Attempt:
    attempt = an_attempt(0, *pods, **fields)
    return Attempt(replace(attempt.job, name="train-check", role=names.ROLE_PREFLIGHT), pods)


def failed(reason: str, message: str = "reported") -> Result:
    return Result(outcome="failed", reason=reason, message=message)


def an_observation(job: FineTuneJob | None = None, *attempts: Attempt, **fields: Any) -> Observed:
    return Observed(job=job or a_job(), attempts=attempts, **fields)
