"""Which jobs the pods of a job are told of, as those whose claims on its output count."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.messages.rivals import digest_of
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.deletion import rivals as listing
from finetune_operator.controller.deletion.rivals import rivals
from finetune_operator.core.status import timestamp
from k8s_operator.support.kubelet_stand_in import job_body
from k8s_operator.support.observed_states import NOW, a_job
from k8s_operator.support.raw_objects import RUNNING, job, pod, terminated


def _cache(namespace: str = "team", **outputs: str) -> Cache:
    """Return a cache of jobs by name, whose uids are their names."""
    cache = Cache()
    for name, uri in outputs.items():
        body = job_body(name, output={"uri": uri})
        body["metadata"] |= {"namespace": namespace, "uid": name, "resourceVersion": "1", "generation": 1}
        cache.put_body(body)
    return cache


def _rivals(cache: Cache, uri: str = "s3://outputs/result") -> tuple[str, ...]:
    known = rivals(cache, a_job(output={"uri": uri}), ("all", "team"), NOW)
    assert known is not None
    own = uri.startswith(("pvc", "volume"))
    assert (known.as_of, known.namespaces) == (timestamp(NOW), ("team",) if own else ("all", "team"))
    return known.digests


def _of(*uids: str) -> tuple[str, ...]:
    return tuple(sorted(map(digest_of, uids)))


def test_pods_are_told_no_uid_of_another_job() -> None:
    known = rivals(_cache(secret="s3://outputs/result"), a_job(output={"uri": "s3://outputs/result"}), (), NOW)
    assert known is not None
    assert known.include("secret")
    assert not known.include("another")
    assert "secret" not in known.model_dump_json()


@pytest.mark.parametrize(
    ("uri", "other", "is_rival"),
    [
        ("s3://outputs/result", "s3://outputs/result", True),
        ("s3://outputs/result", "s3://outputs/result/", True),
        ("s3://outputs/result", "s3://outputs/result/x", False),
        ("s3://outputs/result", "gs://outputs/result", False),
        ("s3://outputs/result", "pvc://outputs/result", False),
        ("pvc://outputs/result", "pvc://other/result", True),
        ("pvc://outputs/result", "volume://results/x", True),
    ],
)
def test_jobs_that_may_name_the_same_folder_are_rivals(uri: str, other: str, is_rival: bool) -> None:
    assert _rivals(_cache(a=other, b="s3://elsewhere/x"), uri) == (_of("a") if is_rival else ())
    is_anywhere = is_rival and uri.startswith("s3")
    assert _rivals(_cache("elsewhere", a=other), uri) == (_of("a") if is_anywhere else ())


def test_a_job_is_no_rival_of_its_own() -> None:
    cache = _cache(train="s3://outputs/result")
    body: Any = next(cache.bodies())
    cache.put_body({**body, "metadata": {**body["metadata"], "uid": "job-uid", "resourceVersion": "2"}})
    assert _rivals(cache) == ()


@pytest.mark.parametrize(("phase", "state", "lives"), [("Running", RUNNING, True), ("Failed", terminated(1), False)])
def test_a_deleted_job_is_a_rival_until_its_pods_have_stopped(phase: str, state: Any, lives: bool) -> None:
    cache = _cache()
    cache.put_job(job())
    stopping = pod(phase, state)
    stopping["metadata"]["labels"]["finetune-operator.io/job-uid"] = "former"
    cache.put_pod(stopping)
    assert _rivals(cache) == (_of("former") if lives else ())


def test_more_rivals_than_an_annotation_holds_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_RIVALS", 2)
    cache = _cache(a="pvc://a/x", b="pvc://b/x", c="pvc://c/x")
    assert rivals(cache, a_job(output={"uri": "pvc://d/x"}), (), NOW) is None
