"""FineTuneJobs whose output is cleaned when they are deleted, on a real API server with the real
Job controller and garbage collector. The test plays the kubelet, so no store is involved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.messages.run import parse
from k8s_operator.support.kubelet_stand_in import World
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster

Raw = dict[str, Any]
DONE = Result(outcome="succeeded", message="deleted 2 checkpoints in s3://outputs/result")
OUTPUT = {"uri": "s3://outputs/result", "credentialsRef": {"name": "keys"}, "deletionPolicy": "Delete"}


@pytest.fixture(autouse=True)
def no_finalizers_left(world: World) -> Iterator[None]:
    """Lets the namespace go once the operator is dead."""
    yield
    for body in world.all("finetunejobs"):
        world.patch("finetunejobs", body["metadata"]["name"], {"metadata": {"finalizers": []}})


def finalizers(world: World, name: str) -> list[str]:
    body = world.get("finetunejobs", name) or {"metadata": {}}
    present: list[str] = body["metadata"].get("finalizers", [])
    return present


def wait_held(world: World, name: str) -> None:
    world.wait(lambda: names.FINALIZER in finalizers(world, name), what=lambda: f"finalizer of {name}")


def wait_gone(world: World, name: str, seconds: float = 15) -> None:
    world.wait(lambda: world.get("finetunejobs", name) is None, seconds, lambda: f"end of {name}")


def events(world: World, reason: str) -> list[str]:
    return [event["message"] for event in world.all("events") if event["reason"] == reason]


def training(world: World, name: str, **sections: Any) -> None:
    """A job that trains, whose output is to be deleted with it."""
    world.submit(name, **{"output": OUTPUT, **sections})
    world.run_pods(f"{name}-1")
    world.wait_phase(name, "Running")


def wait_cleanup(world: World, name: str) -> Raw:
    """Wait for the pod that cleans, and return it."""
    (pod,) = world.run_pods(f"{name}-clean")
    return pod


def test_a_deleted_job_ends_its_pods_has_its_output_cleaned_and_goes(world: World, operator: Operator) -> None:
    enforce = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    world.request("PATCH", f"/api/v1/namespaces/{world.namespace}", enforce, "application/merge-patch+json")
    training(world, "one")
    world.delete("finetunejobs", "one", propagationPolicy="Background")
    world.leave("one-1")
    pod = wait_cleanup(world, "one")
    assert world.status("one")["message"].startswith("being deleted: output.deletionPolicy is Delete")
    (container,) = pod["spec"]["containers"]
    assert container["args"] == ["cleanup"]
    assert {v["name"] for v in pod["spec"]["volumes"]} == {"tmp", "run-config", "credentials-output"}
    assert parse(pod["metadata"]["annotations"][names.ANNOTATION_RUN_CONFIG]).deletion_policy == "Delete"
    policy = world.get("networkpolicies", "one-pods")
    assert policy is not None
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    world.end_pod(pod, 0, DONE)
    wait_gone(world, "one")
    assert events(world, "OutputCleaned") == [DONE.message]
    world.wait(lambda: not world.all("jobs"), what=lambda: "removal of all Jobs")


@pytest.mark.parametrize("policy", ["Foreground", "Orphan"])
def test_the_garbage_collector_comes_first(world: World, operator: Operator, policy: str) -> None:
    training(world, "waits")
    (pod,) = world.all("pods")
    world.delete("finetunejobs", "waits", propagationPolicy=policy)
    if policy == "Foreground":
        world.leave("waits-1")
    else:
        world.wait(lambda: finalizers(world, "waits") == [names.FINALIZER], what=lambda: "the orphaning")
        assert not world.all("jobs", **{names.LABEL_ROLE: names.ROLE_CLEANUP})
        world.wait(lambda: world.status("waits")["message"].startswith("being deleted"))
        assert "deletionTimestamp" not in (world.get("jobs", "waits-1") or {})["metadata"], "it was to be left alone"
        world.end_pod(pod, 0, DONE)
    world.end_pod(wait_cleanup(world, "waits"), 0, DONE)
    wait_gone(world, "waits")
    assert events(world, "OutputCleaned") == [DONE.message]


def test_the_finalizer_follows_the_policy_and_a_job_that_retains_has_none(world: World, operator: Operator) -> None:
    training(world, "fickle", output={"uri": "s3://outputs/result"})
    assert finalizers(world, "fickle") == []
    before = world.get("pods", world.all("pods")[0]["metadata"]["name"])
    for policy, expected in (("DeleteCheckpoints", [names.FINALIZER]), ("Retain", [])):
        answer = world.patch("finetunejobs", "fickle", {"spec": {"output": {"deletionPolicy": policy}}})
        assert answer.accepted, answer.message
        world.wait(lambda e=expected: finalizers(world, "fickle") == e, what=lambda: "another finalizer")
    assert before == world.get("pods", before["metadata"]["name"]) if before else False, "its pods stay as they are"
    world.delete("finetunejobs", "fickle", propagationPolicy="Background")
    wait_gone(world, "fickle")
    assert not world.all("jobs", **{names.LABEL_ROLE: names.ROLE_CLEANUP})


def test_a_finalizer_of_somebody_else_stays(world: World, operator: Operator) -> None:
    training(world, "shared")
    wait_held(world, "shared")
    both = [*finalizers(world, "shared"), "example.com/audit"]
    world.patch("finetunejobs", "shared", {"metadata": {"finalizers": both}})
    world.delete("finetunejobs", "shared", propagationPolicy="Background")
    world.leave("shared-1")
    world.end_pod(wait_cleanup(world, "shared"), 0, DONE)
    world.wait(lambda: finalizers(world, "shared") == ["example.com/audit"], what=lambda: "the end of the cleanup")
    world.patch("finetunejobs", "shared", {"metadata": {"finalizers": []}})
    wait_gone(world, "shared")


FAILURES: dict[str, tuple[str, str]] = {
    "the store refuses": ("refuse", "AccessDenied: output.uri: the store refused the credentials"),
    "the Secret is gone": ("no secret", 'secret "keys" not found'),
    "no pod can be created": ("quota", "exceeded quota"),
    "nothing happens in time": ("silence", "within 10 s (pods.cleanupSeconds of the chart)"),
}


@pytest.mark.parametrize(("failure", "message"), FAILURES.values(), ids=FAILURES)
def test_a_cleanup_that_fails_keeps_nothing_and_says_what_is_left(
    world: World, operators: Callable[..., Operator], failure: str, message: str
) -> None:
    operators(pods={"gracePeriodSeconds": 30, "cleanupSeconds": 10}).start()
    training(world, "stuck")
    if failure == "quota":
        body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
        world.create("resourcequotas", {**body, "spec": {"hard": {"count/jobs.batch": "1"}}})
        world.wait(lambda: (world.get("resourcequotas", "none") or {})["status"].get("used"), what=lambda: "quota")
        world.create("jobs", plain_job("filler"))
    world.delete("finetunejobs", "stuck", propagationPolicy="Background")
    world.leave("stuck-1")
    if failure in ("refuse", "no secret"):
        (pod,) = world.wait_pods("stuck-clean")
        refused = Result(outcome="failed", reason="AccessDenied", message=message.partition(": ")[2])
        if failure == "refuse":
            world.run_pod(pod)
            world.end_pod(pod, 68, refused)
        else:
            world.bind(pod)
            world.warn(pod, "FailedMount", f'MountVolume.SetUp failed for volume "credentials-output": {message}')
    wait_gone(world, "stuck", 100)
    (left,) = events(world, "OutputNotCleaned")
    assert left.startswith("the checkpoints and the result in s3://outputs/result aren't deleted, as far as")
    assert message in left


def plain_job(name: str) -> Raw:
    container = {"name": "c", "image": "i"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    meta = {"name": name}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": {"suspend": True, "template": template}}


def test_a_namespace_that_is_deleted_is_not_held_up(world: World, operator: Operator) -> None:
    training(world, "doomed")
    wait_held(world, "doomed")
    world.request("DELETE", f"/api/v1/namespaces/{world.namespace}")
    world.leave("doomed-1")
    wait_gone(world, "doomed", 30)
    path = f"/api/v1/namespaces/{world.namespace}"
    world.wait(lambda: not world.request("GET", path).accepted, 60, lambda: "end of the namespace")


def test_a_deletion_while_no_operator_runs_is_caught_up_with(world: World, operators: Callable[..., Operator]) -> None:
    operator = operators()
    operator.start()
    training(world, "missed")
    operator.kill()
    world.delete("finetunejobs", "missed", propagationPolicy="Background", gracePeriodSeconds=0)
    assert world.get("finetunejobs", "missed"), "it is held"
    operator.start()
    world.leave("missed-1")
    pod = wait_cleanup(world, "missed")
    operator.kill()
    world.end_pod(pod, 0, DONE)
    operator.start()
    wait_gone(world, "missed", 30)
    assert events(world, "OutputCleaned") == [DONE.message]
    assert len(world.all("jobs", **{names.LABEL_ROLE: names.ROLE_CLEANUP})) <= 1


def test_a_job_applied_again_starts_when_the_old_output_is_clean(world: World, operator: Operator) -> None:
    training(world, "again")
    world.delete("finetunejobs", "again", propagationPolicy="Background")
    world.leave("again-1")
    world.end_pod(wait_cleanup(world, "again"), 0, DONE)
    wait_gone(world, "again")
    training(world, "again")


def test_a_job_that_never_had_a_pod_goes_at_once(world: World, operators: Callable[..., Operator]) -> None:
    world.submit("unborn", output=OUTPUT)
    world.patch("finetunejobs", "unborn", {"metadata": {"finalizers": [names.FINALIZER]}})
    world.delete("finetunejobs", "unborn", propagationPolicy="Background")
    operators().start()
    wait_gone(world, "unborn")
    assert not world.all("jobs")


def test_what_the_administrator_does_not_offer_is_not_used_for_a_cleanup_either(
    world: World, operators: Callable[..., Operator]
) -> None:
    output = {"uri": "pvc://theirs/x", "deletionPolicy": "Delete"}
    operators(tenants={"claims": ["shared-*"]}).start()
    world.submit("greedy", output=output)
    world.wait(lambda: world.status("greedy").get("reason") == "NotAllowed", what=lambda: "refusal")
    world.delete("finetunejobs", "greedy", propagationPolicy="Background")
    wait_gone(world, "greedy")
    (left,) = events(world, "OutputNotCleaned")
    assert "isn't among the operator's tenants.claims" in left
    assert not world.all("jobs")
