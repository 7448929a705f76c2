"""Builders of Jobs and pods as the API server has them, with the words of kubelets, schedulers and
the Job controller, and of what the operator reports about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from finetune_api import names
from finetune_api.messages.result import Result, encode
from finetune_api.status import Condition, Phase, Status
from finetune_operator.core import parsing
from finetune_operator.core.actions import Decision
from finetune_operator.core.decide import decide
from finetune_operator.core.objects import Observed, attempts
from finetune_operator.core.status import status, timestamp
from k8s_operator.support.observed_states import NOW, a_job

Raw = dict[str, Any]

RUNNING: Raw = {"running": {}}
CREATING: Raw = {"waiting": {"reason": "ContainerCreating"}}
INITIALIZING: Raw = {"waiting": {"reason": "PodInitializing"}}
DONE = Result(outcome="succeeded")
PREEMPTED = Result(outcome="preempted", reason="Preempted", message="asked to stop at step 5")
BACKOFF = ("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")


def ago(seconds: float) -> str:
    """Return the time that many seconds before NOW."""
    return timestamp(NOW - timedelta(seconds=seconds))


def job(number: int = 1, pods: int = 1, *conditions: tuple[str, str, str], name: str = "") -> Raw:
    """Return the Job of an attempt; a condition is a type, a reason and a message."""
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "train", "uid": "job-uid", "controller": True}
    return {
        "metadata": {
            "namespace": "team", "name": name or f"train-{number}", "uid": f"child-{number}", "resourceVersion": "1",
            "creationTimestamp": ago(300), "ownerReferences": [owner],
        },
        "spec": {"completions": pods},
        "status": {
            "conditions": [
                {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": ago(10)}
                for kind, reason, message in conditions
            ]
        },
    }  # fmt: skip


def terminated(code: int, reason: str = "", message: str = "", result: Result | None = None, age: float = 20) -> Raw:
    """Return the state of a container that ended `age` seconds ago."""
    reason = reason or ("Error" if code else "Completed")
    text = encode(result) if result else message
    return {"terminated": {"exitCode": code, "reason": reason, "message": text, "finishedAt": ago(age)}}


def waiting(reason: str, message: str = "") -> Raw:
    """Return the state of a container that waits."""
    return {"waiting": {"reason": reason, "message": message}}


def pod(phase: str, trainer: Raw | None = None, number: int = 1, index: int = 0, **fields: Any) -> Raw:
    """Return a pod on a node; without one, by node="".

    `containers` and `inits` are the states of other containers by name; `conditions`, `reason` and
    `message` are of its status, and `gates` of its spec.
    """
    node = fields.get("node", "node-a")
    conditions = [*fields.get("conditions", ())]
    if node:
        conditions.append({"type": "PodScheduled", "status": "True", "lastTransitionTime": ago(290)})
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": f"train-{number}", "uid": f"child-{number}"}
    containers = _states({**({names.CONTAINER_TRAINER: trainer} if trainer else {}), **fields.get("containers", {})})
    return {
        "metadata": {
            "namespace": "team", "name": f"train-{number}-{index}-abcde", "uid": f"pod-{number}-{index}",
            "resourceVersion": "1", "creationTimestamp": ago(300), "ownerReferences": [{**owner, "controller": True}],
            "labels": {
                "batch.kubernetes.io/job-completion-index": str(index), names.LABEL_JOB_UID: "job-uid",
            },
            **fields.get("metadata", {}),
        },
        "spec": {
            **({"nodeName": node} if node else {}),
            "schedulingGates": [{"name": gate} for gate in fields.get("gates", ())],
        },
        "status": {
            "phase": phase, "conditions": conditions, "containerStatuses": containers,
            "initContainerStatuses": _states(fields.get("inits", {})),
            "reason": fields.get("reason", ""), "message": fields.get("message", ""),
        },
    }  # fmt: skip


def disrupted(reason: str, message: str = "") -> Raw:
    """Return the condition of a pod that the cluster has ended."""
    return {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}


def unscheduled(reason: str, message: str) -> Raw:
    """Return the condition of a pod without a node."""
    return {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}


def _states(containers: Mapping[str, Raw]) -> list[Raw]:
    return [{"name": name, "state": state, "restartCount": 0} for name, state in containers.items()]


@dataclass(frozen=True)
class Outcome:
    """What the operator decides and reports about one observation."""

    observed: Observed
    decision: Decision
    status: Status

    @property
    def text(self) -> str:
        """The longest message of status, its conditions and its failure."""
        failure = [self.status.failure.message] if self.status.failure else []
        return max((self.status.message, *failure, *(c.message for c in self.status.conditions)), key=len)


def outcome(
    jobs: Sequence[Raw], pods: Sequence[Raw], phase: Phase = "Running", attempt: int = 1, **fields: Any
) -> Outcome:
    """Decide about a FineTuneJob with these Jobs and pods; `warnings` are Events by uid."""
    suspended = Condition(type="Suspended", status="False", last_transition_time=ago(300), reason="NotSuspended")
    before = Status(
        observed_generation=1, phase=phase, attempt=attempt, conditions=(suspended,), start_time=ago(300),
        **fields.get("status", {}),
    )  # fmt: skip
    parsed = [parsing.pod(raw) for raw in pods]
    children = [parsing.child_job(raw) for raw in jobs]
    by_job = {child.uid: [pod for pod in parsed if pod.job_uid == child.uid] for child in children}
    checks = attempts((child for child in children if child.role == names.ROLE_PREFLIGHT), by_job)
    observed = Observed(
        job=a_job(before, **fields.get("spec", {})),
        attempts=attempts((child for child in children if child.role == names.ROLE_TRAINER), by_job),
        preflight=checks[0] if checks else None,
        orphaned_pods=tuple(pod for pod in parsed if pod.job_uid not in by_job),
        warning_events=fields.get("warnings", {}),
    )
    decision = decide(observed, NOW)
    return Outcome(observed, decision, status(observed, decision.desired, NOW) if decision.desired else before)
