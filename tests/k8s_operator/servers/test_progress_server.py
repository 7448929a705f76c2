"""Progress is accepted only from the current attempt's pods, by real projected tokens that a real
API server reviews."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from finetune_api import names
from finetune_api.messages.progress import Progress
from k8s_operator.support.kubelet_stand_in import Raw, World, audit_writes
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster


def _token(world: World, pod: Raw | None, audience: str = names.PROGRESS_AUDIENCE) -> str:
    """Request a token as the kubelet does: bound to the pod."""
    spec: Raw = {"audiences": [audience], "expirationSeconds": 600}
    if pod:
        meta = pod["metadata"]
        spec["boundObjectRef"] = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    answer = world.request("POST", world.path("serviceaccounts", "default") + "/token", request)
    assert answer.accepted, answer.message
    token: str = answer.body["status"]["token"]
    return token


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _post(operator: Operator, token: str, progress: Progress | bytes) -> tuple[int, Raw]:
    body = progress if isinstance(progress, bytes) else progress.model_dump_json(by_alias=True).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{operator.progress_port}{names.PROGRESS_PATH}"
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, {"message": error.read().decode(), "location": error.headers.get("Location")}


def _post_when_known(operator: Operator, token: str, progress: Progress | bytes) -> tuple[int, Raw]:
    """Post as soon as the operator's watch has seen the pod; until then it answers 403."""
    deadline = time.monotonic() + 30
    while (answer := _post(operator, token, progress))[0] == 403 and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def test_progress_is_accepted_shown_in_status_and_exported_and_outlives_the_pod(
    world: World, operator: Operator
) -> None:
    world.submit("live")
    (pod,) = world.run_pods("live-1")
    progress = Progress(
        attempt=1, phase="training", step=6, total_steps=24, train_loss=2.5, tokens=1000, eta_seconds=90
    )
    code, answer = _post_when_known(operator, _token(world, pod), progress)
    assert code == 200, answer
    status = world.wait(lambda: (s := world.status("live")).get("progress") and s)
    assert status["progress"]["percent"] == 25
    assert status["progress"]["trainLoss"] == 2.5
    job = {"namespace": world.namespace, "job": "live"}
    assert operator.samples("finetune_job_train_loss", **job) == [2.5]
    assert operator.samples("finetune_job_tokens_total", **job) == [1000.0]
    world.end_pod(pod, 0)
    world.wait_phase("live", "Succeeded")
    operator.kill()
    operator.start()
    assert operator.samples("finetune_job_train_loss", **job) == [2.5]
    assert operator.samples("finetune_job_status_condition", condition="Complete", **job) == [1.0]


def test_running_is_reported_together_with_the_first_progress(world: World, crd: Any, operator: Operator) -> None:
    world.submit("fold")
    (pod,) = world.run_pods("fold-1")
    fetching = Progress(attempt=1, phase="fetching", message="fetching the model")
    assert _post_when_known(operator, _token(world, pod), fetching)[0] == 200
    status = world.wait_phase("fold", "Running")
    assert status["progress"]["message"] == "fetching the model"
    assert _status_writes(crd, world) == 2, audit_writes(crd.audit_log, world.namespace)


def _status_writes(crd: Any, world: World) -> int:
    return audit_writes(crd.audit_log, world.namespace).count("patch finetunejobs/status")


def test_status_is_written_only_now_and_then_even_if_progress_comes_often(
    world: World, operators: Callable[..., Operator], crd: Any
) -> None:
    operator = operators(progress={"writeEverySeconds": 6})
    operator.start()
    world.submit("often")
    (pod,) = world.run_pods("often-1")
    world.wait_phase("often", "Running")
    token = _token(world, pod)
    before = _status_writes(crd, world)
    started = time.monotonic()
    step = 0
    while time.monotonic() - started < 6:
        step += 1
        code, _ = _post(operator, token, Progress(attempt=1, phase="training", step=step, total_steps=100))
        assert code == 200
        time.sleep(0.5)
    assert 2 <= _status_writes(crd, world) - before <= 5


def test_a_token_for_somebody_else_is_refused(world: World, operator: Operator) -> None:
    world.submit("door")
    (pod,) = world.run_pods("door-1")
    progress = Progress(attempt=1)
    assert _post(operator, "not.a.token", progress)[0] == 401
    assert _post(operator, _token(world, pod, "https://kubernetes.default.svc"), progress)[0] == 401
    assert _post(operator, _token(world, None), progress)[0] == 401


def test_a_pod_reports_only_for_its_own_job_and_attempt(world: World, operator: Operator) -> None:
    stranger = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "stranger", "labels": {"app.kubernetes.io/managed-by": "finetune-operator"}},
        "spec": {"containers": [{"name": "trainer", "image": "i"}]},
    }
    foreign = world.create("pods", stranger)
    code, answer = _post(operator, _token(world, foreign), Progress(attempt=1))
    assert code == 403, answer
    world.submit("mine")
    (pod,) = world.run_pods("mine-1")
    token = _token(world, pod)

    def refused() -> bool:
        code, answer = _post(operator, token, Progress(attempt=2))
        assert code == 403
        return "attempt 1" in answer["message"]

    world.wait(refused, what=lambda: "refusal that names the attempt")


def test_a_post_that_is_too_large_wrong_or_too_often_is_refused(world: World, operator: Operator) -> None:
    world.submit("flood")
    (pod,) = world.run_pods("flood-1")
    token = _token(world, pod)
    large = b'{"attempt": 1, "message": "' + b"x" * 20000 + b'"}'
    assert _post_when_known(operator, token, large)[0] == 413
    code, answer = _post(operator, token, b'{"attempt": "many"}')
    assert (code, "attempt" in answer["message"]) == (400, True)
    codes = [_post(operator, token, Progress(attempt=1))[0] for _ in range(30)]
    assert codes[0] == 200
    assert codes[-1] == 429


def test_a_standby_replica_names_the_leader(world: World, operators: Callable[..., Operator]) -> None:
    first = operators(pod_name="first", leader_election={"enabled": True})
    second = operators(pod_name="second", leader_election={"enabled": True})
    first.start()
    second.start()
    code, answer = _post(second, "any", Progress(attempt=1))
    assert code == 307
    assert answer["location"] == f"http://127.0.0.1:{second.progress_port}{names.PROGRESS_PATH}"
