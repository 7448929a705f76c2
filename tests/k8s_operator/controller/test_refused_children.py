"""What the API server, its webhooks and its policies answer to the creation of a child: a job waits
for what may change, and fails only for what its own spec causes."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.controller.cache import Cache
from finetune_operator.controller.creator import Creator
from finetune_operator.core.actions import Blocked, OutOfDate, SpecRefused
from finetune_operator.kube.client import ApiError, NotFound, Refused, Unavailable
from finetune_operator.settings import Settings
from k8s_operator.support.observed_states import an_observation

_MANIFEST = {
    "kind": "Job",
    "metadata": {"name": "train-1", "namespace": "team", "labels": {"finetune-operator.io/job-name": "train"}},
}


class _Server:
    """A client whose creations are all answered with the same error."""

    def __init__(self, error: ApiError) -> None:
        self._error = error

    async def create(self, resource: str, manifest: Any) -> Any:
        raise self._error


ANSWERS: dict[str, tuple[ApiError, type[Exception]]] = {
    "a quota": (Refused(403, "Forbidden", 'exceeded quota: q, requested: count/jobs.batch=1'), Blocked),
    "a webhook that refuses": (
        Refused(403, "", 'admission webhook "validation.gatekeeper.sh" denied the request: [costs] no label'), Blocked),
    "a webhook that refuses with a code of its own": (
        Refused(400, "BadRequest", 'admission webhook "validate.kyverno.svc-fail" denied the request: no label'),
        Blocked),
    "a policy": (
        Refused(422, "Invalid", "jobs.batch \"train-1\" is forbidden: ValidatingAdmissionPolicy 'costs' with binding "
                                "'all' denied request: no label"), Blocked),
    "a webhook that doesn't answer": (
        Unavailable(500, "InternalError", 'Internal error occurred: failed calling webhook "mutate.x": failed to call '
                    'webhook: Post "https://x.svc:443/mutate?timeout=10s": context deadline exceeded'), Blocked),
    "a webhook without pods": (
        Unavailable(500, "InternalError", 'Internal error occurred: failed calling webhook "m": failed to call '
                    'webhook: no endpoints available for service "m"'), Blocked),
    "an overloaded server": (Unavailable(429, "TooManyRequests", "please try again later"), Unavailable),
    "a slow etcd": (Unavailable(500, "InternalError", "etcdserver: request timed out"), Unavailable),
    "a namespace that is deleted": (
        Refused(403, "Forbidden", "unable to create new content in namespace team because it is being terminated"),
        Blocked),
    "a namespace that is gone": (NotFound(404, "NotFound", 'namespaces "team" not found'), OutOfDate),
    "a manifest that no cluster accepts": (
        Refused(422, "Invalid", 'Job.batch "train-1" is invalid: spec.template.spec.nodeSelector: Invalid value'),
        SpecRefused),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "then"), ANSWERS.values(), ids=ANSWERS)
async def test_a_child_that_cannot_be_created_fails_a_job_only_by_its_own_fault(
    answer: ApiError, then: type[Exception]
) -> None:
    settings = Settings.model_validate({"trainerImage": "example.test/trainer:1"})
    creator = Creator(_Server(answer), Cache(), settings)  # type: ignore[arg-type]
    with pytest.raises(then) as raised:
        await creator.create("jobs", _MANIFEST, an_observation())
    if then in (Blocked, SpecRefused):
        assert answer.message in str(raised.value)
