"""The steps by which a FineTuneJob ends whose output is cleaned: a table of what is observed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api import names
from finetune_api.messages.result import Result
from finetune_api.status import Status
from finetune_operator.core.deletion.step import MAX_TRIES, Deleting, next_step
from finetune_operator.core.objects import Attempt, Companion, Pod, Termination
from k8s_operator.support.observed_states import (
    BEFORE,
    NOW,
    a_check,
    a_dead_pod,
    a_done_pod,
    a_job,
    a_pod,
    an_attempt,
    an_observation,
)

RECENTLY = "2026-01-02T03:03:55Z"  # 10 s before NOW
DONE = Result(outcome="succeeded", message="deleted 2 checkpoints in s3://outputs/result")


def a_cleanup(*pods: Pod, **fields: Any) -> Attempt:
    check = a_check(*pods, **{"created": RECENTLY, **fields})
    return Attempt(replace(check.job, name="train-clean", role=names.ROLE_CLEANUP), pods)


def kept_by_a_proxy(since: str) -> Pod:
    done = Termination(0, "Completed", finished_at=since)
    return a_pod(termination=done, result=DONE, companions=(Companion("istio-proxy", running=True),))


def deleting(*attempts: Attempt, policy: str = "Delete", status: Status | None = None, **fields: Any) -> Deleting:
    output = {"uri": "s3://outputs/result", "deletionPolicy": policy}
    job = a_job(status=status or Status(observed_generation=1, attempt=1), output=output)
    observed = an_observation(job, *attempts, preflight=fields.pop("preflight", None), **fields.pop("also", {}))
    return Deleting(**{"observed": observed, "since": RECENTLY, **fields})


def ended(**fields: Any) -> Attempt:
    return an_attempt(1, a_pod(phase="Succeeded", started=True), complete=True, **fields)


STUCK = a_pod(phase="Pending", uid="stuck", started=False)
SECRET = {"stuck": 'FailedMount: MountVolume.SetUp failed for volume "credentials-output": secret "s3" not found'}
CASES: dict[str, tuple[Deleting, str, str]] = {
    "the policy has changed meanwhile": (deleting(an_attempt(1, a_pod()), policy="Retain"), "finish", ""),
    "the garbage collector deletes the children": (
        deleting(an_attempt(1, a_pod()), finalizers=(names.FINALIZER, "foregroundDeletion")), "wait", "garbage"),
    "pods run": (deleting(an_attempt(1, a_pod())), "stop", "saving a checkpoint"),
    "a preflight runs": (deleting(preflight=a_check(a_pod())), "stop", ""),
    "pods are stopping": (deleting(an_attempt(1, a_pod(deleting=True), deleting=True)), "wait", "train-1-0"),
    "a pod's node is silent": (
        deleting(an_attempt(1, a_pod(node="n", silent_since="2026-01-02T03:03:00Z"), deleting=True)), "wait", "train"),
    "a pod is lost with its node": (
        deleting(an_attempt(1, a_pod(node="n", silent_since="2026-01-02T02:00:00Z"), deleting=True, failed=True)),
        "clean", "deletionPolicy is Delete"),
    "pods without a Job are stopping": (
        deleting(ended(), also={"orphaned_pods": (a_pod(deleting=True),)}, since=BEFORE), "wait", "train-1-0"),
    "pods without a Job may be stopped soon": (
        deleting(ended(), also={"orphaned_pods": (a_pod(),)}), "wait", "train-1-0"),
    "pods are left running": (
        deleting(ended(), also={"orphaned_pods": (a_pod(),)}, since=BEFORE), "finish", "pods of the job run on"),
    "nothing was created yet": (deleting(status=Status()), "finish", ""),
    "a job that never had a pod": (deleting(status=Status(observed_generation=1)), "clean", "s3://outputs/result"),
    "it has ended": (deleting(ended()), "clean", "s3://outputs/result"),
    "its pods were removed after their time to live": (deleting(), "clean", ""),
    "the cleanup starts": (deleting(ended(), cleanup=a_cleanup()), "wait", "0 of 1 pod running"),
    "the cleanup runs": (deleting(ended(), cleanup=a_cleanup(a_pod())), "wait", "running"),
    "the cleanup is done": (
        deleting(ended(), cleanup=a_cleanup(a_done_pod(result=DONE), complete=True)), "finish", "deleted 2 check"),
    "the cleanup is done, and nobody heard what": (
        deleting(ended(), cleanup=a_cleanup(a_done_pod(), complete=True)), "finish", "no message"),
    "the cleanup is done, and a proxy keeps its pod": (
        deleting(ended(), cleanup=a_cleanup(kept_by_a_proxy(BEFORE))), "finish", "deleted 2 check"),
    "the cleanup is done, and a proxy still sends its logs": (
        deleting(ended(), cleanup=a_cleanup(kept_by_a_proxy(RECENTLY))), "wait", "container istio-proxy still runs"),
    "the cleanup tries again": (
        deleting(ended(), cleanup=a_cleanup(a_dead_pod(0, 74))), "wait", ""),
    "the store refuses": (
        deleting(ended(), cleanup=a_cleanup(
            a_dead_pod(0, 68, Result(outcome="failed", reason="AccessDenied", message="output.uri: refused")),
            failed=True)),
        "finish", "aren't deleted, as far as they exist: AccessDenied: output.uri: refused"),
    "an image that knows no cleanup": (
        deleting(ended(), cleanup=a_cleanup(
            replace(a_dead_pod(0, 2), termination=Termination(2, message="invalid choice: 'cleanup'")), failed=True)),
        "finish", "aren't deleted"),
    "no pod of the cleanup could be created": (
        deleting(ended(), cleanup=a_cleanup(failed=True, failure_reason="DeadlineExceeded")),
        "finish", "within 600 s (pods.cleanupSeconds of the chart)"),
    "the Secret is gone": (
        deleting(ended(), cleanup=a_cleanup(STUCK), warnings=SECRET), "finish", 'secret "s3" not found'),
    "the claim is gone": (
        deleting(ended(), cleanup=a_cleanup(replace(
            STUCK, unschedulable='0/1 nodes are available: persistentvolumeclaim "team" not found.'))),
        "finish", 'persistentvolumeclaim "team" not found'),
    "no node has room": (
        deleting(ended(), cleanup=a_cleanup(replace(STUCK, unschedulable="0/1 nodes: Insufficient cpu."))),
        "wait", "Insufficient cpu"),
    "the Job controller does nothing": (
        deleting(ended(), cleanup=a_cleanup(created="2026-01-02T02:00:00Z")), "finish", "within 600 s"),
    "somebody suspends the cleanup": (
        deleting(ended(), cleanup=a_cleanup(created="2026-01-02T02:00:00Z", suspended=True)), "finish", "within 600 s"),
    "somebody deletes the cleanup": (deleting(ended(), tries=1), "clean", ""),
    "somebody always deletes the cleanup": (
        deleting(ended(), tries=MAX_TRIES), "finish", "the Job train-clean was deleted"),
}  # fmt: skip


@pytest.mark.parametrize(("situation", "do", "message"), CASES.values(), ids=CASES)
def test_the_next_step_of_a_deletion(situation: Deleting, do: str, message: str) -> None:
    step = next_step(situation, NOW)
    assert (step.do, message in step.message) == (do, True), step
    assert bool(step.reason) == (do == "finish" and bool(message))


@pytest.mark.parametrize("name", [name for name, (_, do, _) in CASES.items() if do == "wait"])
def test_a_wait_has_an_end(name: str) -> None:
    """Each of them ends by a time, or with an object that Kubernetes itself ends or removes."""
    step = next_step(CASES[name][0], NOW)
    ends_by_kubernetes = {"the garbage collector deletes the children", "pods are stopping",
                          "pods without a Job are stopping"}  # fmt: skip
    assert (step.seconds is not None) != (name in ends_by_kubernetes)


def test_the_event_names_what_is_left() -> None:
    checkpoints = deleting(ended(), policy="DeleteCheckpoints", tries=MAX_TRIES)
    assert next_step(checkpoints, NOW).message.startswith("the checkpoints in s3://outputs/result aren't deleted")
    everything = deleting(ended(), tries=MAX_TRIES)
    assert next_step(everything, NOW).message.startswith("the checkpoints and the result in s3://outputs/result")
