"""Whatever a pod, a store or a foreign object contains, it is refused or bounded at the border: the
operator stays alive, and another job's status and metrics stay true."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
import time
import tracemalloc
import unicodedata
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kubernetes.aio import client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from finetune_api import names, untrusted
from finetune_api.messages import progress as progress_message
from finetune_api.messages import result as result_message
from finetune_api.messages.progress import Progress
from finetune_api.messages.result import Result
from finetune_api.resource import parse
from finetune_api.status import TERMINAL_PHASES, Status, read
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.progress_store import ProgressStore
from finetune_operator.controller.resync import tolerantly
from finetune_operator.controller.warning_events import WarningEvents
from finetune_operator.core.decide import decide
from finetune_operator.core.objects import Observed
from finetune_operator.core.status import status
from finetune_operator.core.verdict import verdict
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.encoding import yaml_safe
from finetune_operator.kube.rate_limiter import RateLimiter
from finetune_operator.servers import job_metrics, token_reviews
from finetune_trainer.destination import predecessor
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from k8s_operator.support.kubelet_stand_in import job_body
from k8s_operator.support.observed_states import a_done_pod, an_attempt
from security.support.hostile import TEXT, VALUE, fields_of, jobs, pods

_NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
_VICTIM, _NEIGHBOR = "uid-victim", "uid-neighbor"
_SURROGATE_ESCAPE = r"(?<!\\)((?:\\\\)*)\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
_UIDS = (_VICTIM, _NEIGHBOR, "uid-victim-1")


def _body(name: str, uid: str, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    body = job_body(name)
    body["metadata"] |= {"namespace": "team", "uid": uid, "resourceVersion": "1", "generation": 1}
    return body | ({"status": stored} if stored is not None else {})


def _json_with_raw_planes(value: Any) -> str:
    """JSON in which only lone surrogates are escaped as surrogates."""
    return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m.group()):04x}", json.dumps(value, ensure_ascii=False))


def _integers(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in _integers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in _integers(inner)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def _job_raw(**changes: Any) -> dict[str, Any]:
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "victim", "uid": _VICTIM, "controller": True}
    meta = {"namespace": "team", "name": "victim-1", "uid": "j", "resourceVersion": "1", "ownerReferences": [owner]}
    return {"metadata": {**meta, **changes}, "spec": {}}


def _is_safe(text: str) -> bool:
    return all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") or c in "\n\t" for c in text) and not any(
        unicodedata.bidirectional(c) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI") for c in text
    )


def _accepted(document: Status) -> dict[str, Any]:
    """The status as the API server would read it. Raises AssertionError if it would refuse it."""
    sent = yaml_safe({"status": document.to_json()})
    assert not re.search(_SURROGATE_ESCAPE, sent)
    fields: dict[str, Any] = json.loads(sent)["status"]
    assert all(-255 <= number <= 2**63 - 1 for number in _integers(fields))
    assert all(_is_safe(text) for text in _texts(fields))
    assert len(sent) < 1 << 20
    return fields


@_MANY
@given(st.text(st.characters(), max_size=300))
@example("😀 \ud83d \x1b[31m \u202e \u2028 \r\n \U0001fffe")
def test_a_text_from_outside_becomes_one_printable_line(text: str) -> None:
    line = untrusted.line(text)
    assert _is_safe(line)
    assert "\n" not in line
    assert untrusted.line(line) == line
    assert _is_safe(untrusted.lines(text))
    assert len(untrusted.line(text * 300)) <= untrusted.MAX_LINE_CHARACTERS


def test_what_nobody_can_see_is_replaced_and_what_scripts_and_emoji_need_stays() -> None:
    unseen = "\u034f\u115f\u1160\u17b4\u3164\uffa0\U0001bca0\U0001d173\U000e0041\u00ad\u200b\u2062\ufff9\U000e0fff"
    assert set(untrusted.line(unseen)) == {"\ufffd"}
    needed = "\u0915\u094d\u200d\u0937 \U0001f469\u200d\U0001f52c \u2764\ufe0f \u8fbb\U000e0100"
    assert untrusted.line(needed) == needed


_IMPOSSIBLE: tuple[dict[str, Any], ...] = (
    {"step": -5},
    {"step": 10**30},
    {"files": [{"path": "a", "size": -1, "sha256": "x"}]},
    {"job": {"namespace": "a", "name": "b", "uid": "c", "attempt": 2**63}},
)


@pytest.mark.parametrize("change", _IMPOSSIBLE, ids=str)
def test_a_manifest_with_impossible_numbers_is_none(change: dict[str, Any]) -> None:
    job = {"namespace": "a", "name": "b", "uid": "c", "attempt": 1}
    good = {"version": 1, "kind": "checkpoint", "job": job, "step": 1, "created": "x", "files": []}
    assert predecessor.parse(json.dumps(good).encode()) is not None
    assert predecessor.parse(json.dumps({**good, **change}).encode()) is None


@_MANY
@given(VALUE)
@example({"message": "train-😀.jsonl \ud83d \u0085\ufeff"})
def test_a_request_body_is_valid_as_yaml_and_means_what_it_says(value: Any) -> None:
    sent = yaml_safe(value)
    assert not re.search("[\x00-\x1f\x7f-\uffff]", sent)
    assert not re.search(_SURROGATE_ESCAPE, sent)
    assert json.loads(sent) == json.loads(re.sub(_SURROGATE_ESCAPE, r"\1\\ufffd", _json_with_raw_planes(value)))


@_MANY
@given(fields_of(Progress))
@example({"attempt": 1, "step": 10**30, "totalSteps": 5})
@example({"attempt": 1, "step": 7, "totalSteps": 3})
@example({"attempt": 1, "step": -4})
@example({"attempt": 1, "checkpoint": {"step": 99, "uri": "x", "time": "garbage"}})
@example({"attempt": 1, "gpus": [{"index": n} for n in range(280)]})
@example({"attempt": 1, "phase": "anything", "message": "😀\x1b[2J\u202e"})
@example({"attempt": 1, "gpus": [{"index": 0}, {"index": 0}]})
def test_a_hostile_post_is_refused_or_bounded_and_no_other_job_notices(post: dict[str, Any]) -> None:
    cache, store, registry = Cache(), ProgressStore(), CollectorRegistry()
    cache.put_body(_body("victim", _VICTIM, {"phase": "Running", "attempt": 1}))
    cache.put_body(_body("neighbor", _NEIGHBOR, {"phase": "Running", "attempt": 1}))
    store.put(_NEIGHBOR, Progress(attempt=1, step=5, total_steps=10), "2026-01-01T00:00:00Z")
    job_metrics.register(registry, cache, store, 3600)
    try:
        progress = progress_message.decode(json.dumps({"attempt": 1} | post).encode("utf-8", "replace"))
    except ValueError:
        return
    assert progress.total_steps == 0 or progress.step <= progress.total_steps
    store.put(_VICTIM, progress, "2026-01-01T00:00:00Z")
    series = [
        (sample.name, frozenset(sample.labels.items()), sample.value)
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    ]
    assert ("finetune_job_step", frozenset({"namespace": "team", "job": "neighbor"}.items()), 5.0) in series
    victims = [(name, labels) for name, labels, _ in series if ("job", "victim") in labels]
    assert len(victims) == len(set(victims))
    assert len(victims) < 100
    job = parse(_body("victim", _VICTIM, {"phase": "Running", "attempt": progress.attempt}))
    observed = Observed(job=job, report=store.get(_VICTIM))
    desired = decide(observed, _NOW).desired
    assert desired is not None
    _accepted(status(observed, desired, _NOW))


@_MANY
@given(st.one_of(fields_of(Result).map(json.dumps), TEXT))
@example('{"outcome":"succeeded","step":1000000000000000000000000000000}')
@example('{"outcome":"failed","reason":"\\u001b[2J","message":"\\ud83d\\ude00 \\r\\u202e","exitCode":-99999999999}')
@example('{"outcome":"succeeded","checkpoint":{"step":1,"uri":"x","time":"garbage"}}')
def test_a_hostile_termination_message_is_no_result_or_fits_into_status(message: str) -> None:
    result = result_message.decode(message)
    if result is None:
        return
    pod = a_done_pod(0, result)
    observed = Observed(job=parse(_body("victim", _VICTIM)), attempts=(an_attempt(1, pod, complete=True),))
    desired = decide(observed, _NOW).desired
    assert desired is not None
    reported = _accepted(status(observed, desired, _NOW))
    assert reported["phase"] == "Succeeded"
    assert reported.get("artifact", {}).get("uri", "s3://outputs/result") == "s3://outputs/result"


@_MANY
@given(fields_of(Status))
@example({"phase": "Paused", "attempt": 3})
@example({"startTime": "garbage", "phase": "Succeeded"})
@example(
    {
        "phase": "Unheard",
        "conditions": [
            {"type": "Failed", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "X"}
        ],
    }
)
def test_a_status_of_another_version_is_read_as_far_as_possible(stored: dict[str, Any]) -> None:
    known = read(stored)
    _accepted(known)
    if stored.get("phase") in TERMINAL_PHASES:
        assert known.phase == stored["phase"]
    if stored.get("phase") == "Unheard":
        assert known.phase == "Failed"


@_MANY
@given(st.lists(st.one_of(
    st.tuples(st.just("job"), jobs(("team", "elsewhere"), ("victim-1", "victim-5000", "victim-check", "other"), _UIDS)),
    st.tuples(st.just("pod"), pods(("team", "elsewhere"), ("victim-1-0", "evil"), _UIDS)),
), max_size=6))  # fmt: skip
def test_hostile_jobs_and_pods_are_ignored_unless_they_are_proven_to_be_children(
    objects: list[tuple[str, dict[str, Any]]],
) -> None:
    cache = Cache()
    cache.put_body(_body("victim", _VICTIM, {"phase": "Running", "attempt": 1}))
    for kind, raw in objects:
        tolerantly(cache.put_job if kind == "job" else cache.put_pod, raw)
        tolerantly(
            lambda last, kind=kind: (cache.drop_job if kind == "job" else cache.drop_pod)(
                last["metadata"]["uid"], last
            ),  # type: ignore[misc]
            raw,
        ) if raw["metadata"]["resourceVersion"].endswith("3") else None
    snapshot = cache.snapshot(("team", "victim"))
    assert snapshot is not None
    for attempt in snapshot.attempts:
        assert (attempt.job.namespace, attempt.job.name) == ("team", f"victim-{attempt.number}")
        assert attempt.number <= 2
        assert 1 <= attempt.job.expected_pods <= 1024
        assert all(pod.namespace == "team" and pod.job_uid == attempt.job.uid for pod in attempt.pods)
        verdict(attempt)
    assert all(pod.namespace == "team" for pod in snapshot.orphaned_pods)
    observed = Observed(
        job=parse(_body("victim", _VICTIM)).model_copy(update={"status": read(snapshot.body["status"])}),
        attempts=snapshot.attempts, preflight=snapshot.preflight, orphaned_pods=snapshot.orphaned_pods,
    )  # fmt: skip
    decision = decide(observed, _NOW)
    assert decision.desired is not None
    _accepted(status(observed, decision.desired, _NOW))


@_MANY
@given(TEXT)
@example("a." + "A" * 9000 + ".c")
@example("e30.W10.e30")
@example("x.eyJhdWQiOltdfQ.x")
def test_a_text_that_is_no_token_is_not_reviewed(token: str) -> None:
    assert token_reviews.claimed(token, 0.0) is None


def test_a_job_of_two_billion_completions_costs_no_memory() -> None:
    labels = {names.LABEL_ROLE: names.ROLE_TRAINER, names.LABEL_ATTEMPT: "1"}
    raw = {**_job_raw(labels=labels), "spec": {"completions": 2147483647}}
    cache = Cache()
    cache.put_body(_body("victim", _VICTIM))
    cache.put_job(raw)
    snapshot = cache.snapshot(("team", "victim"))
    assert snapshot is not None
    tracemalloc.start()
    try:
        verdict(snapshot.attempts[0])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("reason", "label"), [("DiskFull", "DiskFull"), ("MadeUp7f3a", "Other"), ("X" * 60, "Other")])
def test_a_reason_that_a_pod_makes_up_makes_no_series(reason: str, label: str) -> None:
    cache, registry = Cache(), CollectorRegistry()
    failure = {"reason": reason, "message": "x", "attempt": 1}
    cache.put_body(_body("victim", _VICTIM, {"phase": "Restarting", "reason": reason, "failure": failure}))
    job_metrics.register(registry, cache, ProgressStore(), 3600)
    labels = {"namespace": "team", "job": "victim", "reason": label}
    assert registry.get_sample_value("finetune_job_reason", labels) == 1
    assert generate_latest(registry).decode().count("finetune_job_reason{") == 1


@pytest.mark.parametrize("uri", ["s3://evil/backdoored-adapter", "s3://outputs/result-2", "s3://outputs/result/../x"])
def test_a_result_elsewhere_is_not_believed(uri: str) -> None:
    artifact = {"uri": uri, "manifestDigest": "sha256:EVIL", "sizeBytes": 666}
    result = result_message.decode(json.dumps({"outcome": "succeeded", "artifact": artifact}))
    observed = Observed(
        job=parse(_body("victim", _VICTIM)), attempts=(an_attempt(1, a_done_pod(0, result), complete=True),)
    )
    desired = decide(observed, _NOW).desired
    assert desired is not None
    after = status(observed, desired, _NOW)
    assert after.artifact is None
    assert uri not in json.dumps(after.to_json())
    assert "spec.output.uri" in after.message


@pytest.mark.parametrize(
    "counts", [{"memory": 2**63 - 1, "application": 2**63 - 1}, {"memory": 2**64}, [], "x"], ids=str
)
def test_restarts_that_somebody_writes_into_an_annotation_fit_into_status(counts: Any) -> None:
    cache = Cache()
    cache.put_body(_body("victim", _VICTIM, {"phase": "Running", "attempt": 1}))
    cache.put_job(_job_raw(annotations={names.ANNOTATION_RESTARTS: json.dumps(counts)}))
    snapshot = cache.snapshot(("team", "victim"))
    assert snapshot is not None
    observed = Observed(job=parse(_body("victim", _VICTIM, {"attempt": 1})), attempts=snapshot.attempts)
    desired = decide(observed, _NOW).desired
    assert desired is not None
    _accepted(status(observed, desired, _NOW))


@pytest.mark.parametrize(
    "place", ["checkpoints/../../evil", "checkpoints/step-8", "checkpoints/step-7/../../x", "checkpoints/", "x/step-7"]
)
def test_a_checkpoint_elsewhere_is_not_believed(place: str) -> None:
    def reported(uri: str) -> Any:
        checkpoint = {"step": 7, "uri": uri, "time": "2026-01-01T00:00:00Z"}
        result = result_message.decode(json.dumps({"outcome": "preempted", "checkpoint": checkpoint}))
        attempt = an_attempt(1, a_done_pod(0, result), failed=True)
        observed = Observed(job=parse(_body("victim", _VICTIM)), attempts=(attempt,))
        desired = decide(observed, _NOW).desired
        assert desired is not None
        return status(observed, desired, _NOW).checkpoint

    assert reported(f"s3://outputs/result/{place}") is None
    assert reported("s3://outputs/result/checkpoints/step-7") is not None


class _Pages(BaseHTTPRequestHandler):
    """Answers lists of large Events page by page, as an API server does."""

    events: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        begin, limit = int(query.get("continue", ["0"])[0]), int(query["limit"][0])
        more = {"continue": str(begin + limit)} if begin + limit < len(self.events) else {}
        body = json.dumps({"items": self.events[begin : begin + limit], "metadata": more}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


async def test_events_of_any_size_and_number_take_little_memory_and_say_what_they_said() -> None:
    def event(uid: str) -> dict[str, Any]:
        last = {"involvedObject": {"uid": uid}, "reason": "Failed", "lastTimestamp": "2026-01-01T00:00:00Z"}
        return {**last, "message": "no such Secret", "metadata": {}}

    huge = [event(f"{number}-" + "x" * 1_000_000) for number in range(40)]
    handler = type("Handler", (_Pages,), {"events": [*huge, *(event(f"u{n}") for n in range(5500)), event("u1")]})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{server.server_address[1]}"))
        kube = KubeClient(api, RateLimiter(1000, 1000), lambda *_: None)
        warnings = WarningEvents(kube)
        huge.clear()
        try:
            assert await warnings.refresh("team", ("u1",))
            assert warnings.messages == {"u1": "Failed: no such Secret"}
        finally:
            await kube.close()
            server.shutdown()
    remembered = warnings._listed["team"]
    assert len(remembered) <= 5000
    assert max(map(len, remembered)) < 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://me:pw@s3.example/b/k failed", "GET https://…@s3.example/b/k failed"),
        ("404 for url: https://cdn/x?X-Amz-Signature=abc&sig=d.", "404 for url: https://cdn/x?…"),
        ("(https://a/b?sig=1) and 'az://c/d?se=2'", "(https://a/b?…) and 'az://c/d?…'"),
        ("proxy http://token@proxy:1 refused; s3://b/k", "proxy http://…@proxy:1 refused; s3://b/k"),
        ("is it there? me@host", "is it there? me@host"),
        ("hf://org/name, https://a/b", "hf://org/name, https://a/b"),
    ],
)
def test_no_credentials_of_a_url_get_into_a_message_or_a_log(text: str, expected: str) -> None:
    assert untrusted.without_url_secrets(text) == expected
    assert RunError("StorageUnavailable", text).message == expected
    for as_text in (True, False):
        stream = io.StringIO()
        Log(stream, text=as_text).error(text, detail=text)
        Log(stream, text=as_text).relay(0, text)
        assert stream.getvalue().count(expected.partition(" ")[2] or expected) >= 3


def test_texts_of_many_urls_take_no_time() -> None:
    started = time.process_time()
    for text in ("a://" * 16_000, "://" + "x" * 65_000, "http://a@" * 7000, "http://a/?" * 6000):
        untrusted.without_url_secrets(text)
    assert time.process_time() - started < 5
