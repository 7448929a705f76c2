"""Thousands of lives of a job in a small model of a cluster, in which the operator may die between
any two of its writes.

The API server, the Job controller and the kubelet are modeled; decide and status are the real
functions. In every case there are never two groups of pods, there is never an attempt after the
end, and the job ends.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.messages.result import Result
from finetune_api.status import TERMINAL_PHASES, Restarts
from finetune_operator.core.actions import CreateAttempt, DeleteJob
from finetune_operator.core.decide import decide
from finetune_operator.core.objects import SUCCEEDED, Attempt, Observed, Pod, Termination
from finetune_operator.core.status import status
from finetune_operator.core.write_policy import seconds_until_due
from k8s_operator.support.observed_states import NOW, a_job, a_pod, an_attempt, failed

NODES = 2


class Cluster:
    """The stored objects, and what the Job controller and the kubelets do with them."""

    def __init__(self) -> None:
        self.job = a_job(
            distribution={"nodes": NODES},
            run_policy={"maxRestarts": {"application": 3, "memory": 2, "infrastructure": 5}},
        )
        self.attempts: dict[int, Attempt] = {}
        self.orphaned_pods: tuple[Pod, ...] = ()
        self.created: list[int] = []
        self.now = NOW

    # -- the operator ------

    def reconcile(self, writes: int) -> None:
        """Reconcile once; the operator dies after `writes` writes."""
        attempts = tuple(self.attempts[n] for n in sorted(self.attempts))
        observed = Observed(self.job, attempts, orphaned_pods=self.orphaned_pods)
        decision = decide(observed, self.now)
        if decision.status_first and decision.desired and writes > 0:
            after = status(observed, decision.desired, self.now)
            if seconds_until_due(observed.job.status, after, None, 30, self.now) is not None:
                self.job = self.job.model_copy(update={"status": after})
                return
        for action in decision.actions:
            if writes == 0:
                return
            writes -= 1
            if isinstance(action, CreateAttempt):
                self._create(action)
            elif isinstance(action, DeleteJob):
                self._delete(action)
        if decision.desired and writes > 0:
            attempts = tuple(self.attempts[n] for n in sorted(self.attempts))
            observed = Observed(self.job, attempts, orphaned_pods=self.orphaned_pods)
            self.job = self.job.model_copy(update={"status": status(observed, decision.desired, self.now)})

    def _create(self, action: CreateAttempt) -> None:
        assert not self.job.spec.run_policy.suspend
        assert self.job.status.phase not in TERMINAL_PHASES
        assert not self.orphaned_pods
        assert not any(pod.is_live for attempt in self.attempts.values() for pod in attempt.pods)
        assert all(attempt.job.is_finished for attempt in self.attempts.values())
        # A Job that was deleted before any status mentioned it is forgotten; its number may be
        # used again.
        assert action.number not in self.attempts
        assert action.number > self.job.status.attempt
        self.created.append(action.number)
        pods = tuple(
            replace(a_pod(index, "Pending"), name=f"train-{action.number}-{index}", uid=f"{action.number}-{index}")
            for index in range(NODES)
        )
        time = self.now.isoformat()
        self.attempts[action.number] = an_attempt(action.number, *pods, restarts=action.restarts, created=time)

    def _delete(self, action: DeleteJob) -> None:
        number = next((n for n, attempt in self.attempts.items() if attempt.job.uid == action.uid), None)
        if number is None:
            return
        attempt = self.attempts[number]
        if action.wait and attempt.is_live:
            self.attempts[number] = Attempt(replace(attempt.job, deleting=True), attempt.pods)
        else:
            del self.attempts[number]

    # -- the world ------

    def happen(self, event: str) -> None:
        number = max(self.attempts, default=0)
        attempt = self.attempts.get(number)
        if event == "time":
            self.now += timedelta(minutes=10)
        elif event in ("suspend", "resume"):
            self._suspend(event == "suspend")
        elif event == "retry":
            self._change_policy({"retry": self.job.spec.run_policy.retry + 1})
        elif event == "orphaned_pods end":
            self.orphaned_pods = ()
        elif attempt is None:
            return
        elif event == "job deleted":
            self.orphaned_pods += tuple(pod for pod in attempt.pods if pod.is_live)
            del self.attempts[number]
        elif event == "start":
            self._pods(number, lambda pod: replace(pod, phase="Running", started=True) if pod.is_live else pod)
        elif event == "stop":
            if attempt.job.deleting:
                self._pods(number, lambda pod: _ended(pod, 143, Result(outcome="preempted")) if pod.is_live else pod)
        elif event == "finish":
            self._pods(number, lambda pod: _ended(pod, 0, Result(outcome="succeeded")) if pod.is_live else pod)
        elif event == "leave":
            self._pods(number, lambda pod: _ended(pod, 143, Result(outcome="preempted")) if pod.is_live else pod)
        else:
            first = min((pod.index for pod in attempt.pods if pod.is_live), default=-1)
            self._pods(number, lambda pod: _ended(pod, 1, failed(event)) if pod.index == first else pod)
        self._control_jobs()

    def _suspend(self, value: bool) -> None:
        self._change_policy({"suspend": value})

    def _change_policy(self, change: dict[str, object]) -> None:
        policy = self.job.spec.run_policy.model_copy(update=change)
        spec = self.job.spec.model_copy(update={"run_policy": policy})
        metadata = self.job.metadata.model_copy(update={"generation": self.job.metadata.generation + 1})
        self.job = self.job.model_copy(update={"spec": spec, "metadata": metadata})

    def _pods(self, number: int, change: object) -> None:
        attempt = self.attempts[number]
        self.attempts[number] = Attempt(attempt.job, tuple(change(pod) for pod in attempt.pods))  # type: ignore[operator]

    def _control_jobs(self) -> None:
        """A dead pod fails a Job once none of its pods lives; a deleted Job disappears with its
        last pod."""
        for number, attempt in list(self.attempts.items()):
            if any(pod.is_live for pod in attempt.pods):
                continue
            done = all(pod.phase == SUCCEEDED for pod in attempt.pods)
            if attempt.job.deleting:
                del self.attempts[number]
            elif not attempt.job.is_finished:
                job = replace(attempt.job, complete=done, failed=not done, finished_at=self.now.isoformat())
                self.attempts[number] = Attempt(job, attempt.pods)


def _ended(pod: Pod, code: int, result: Result) -> Pod:
    return replace(
        pod, phase="Failed" if code else SUCCEEDED, started=False, termination=Termination(code), result=result
    )


_EVENTS = (
    "start", "start", "leave", "OutOfMemory", "TrainingError", "RankKilled", "PeerLost", "job deleted",
    "orphaned_pods end", "suspend", "resume", "time", "finish",
)  # fmt: skip
_RETRIES = st.sampled_from(
    ("start", "start", "DatasetInvalid", "TrainingError", "retry", "time", "stop", "suspend", "resume")
)
_OWN_DEEDS = st.sampled_from(("start", "stop", "suspend", "resume", "time"))
_STEP = st.tuples(st.sampled_from(_EVENTS), st.integers(min_value=0, max_value=4))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_STEP, max_size=40))
def test_no_crash_and_no_order_of_events_creates_a_second_group(steps: list[tuple[str, int]]) -> None:
    cluster = Cluster()
    for event, writes in steps:
        before = cluster.job.status
        cluster.reconcile(writes)
        cluster.happen(event)
        if before.phase in TERMINAL_PHASES:
            assert cluster.job.status.phase == before.phase
        assert cluster.job.status.attempt <= max(cluster.created, default=0)
    for event in ("resume", "leave", "leave", "orphaned_pods end"):
        cluster.happen(event)
        cluster.reconcile(9)
    for _ in range(6):
        cluster.happen("time")
        cluster.reconcile(9)
        cluster.happen("finish")
        cluster.reconcile(9)
    final = cluster.job.status
    assert final.phase in TERMINAL_PHASES
    assert final.attempt in cluster.created
    restarts = final.restarts
    assert restarts == Restarts() or restarts.application <= 3
    assert restarts.memory <= 2
    assert restarts.infrastructure <= 5
    assert final.restarts_total <= len(cluster.created) - 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(_OWN_DEEDS, st.integers(min_value=0, max_value=4)), max_size=40))
def test_no_order_of_suspensions_and_crashes_counts_as_a_failure(steps: list[tuple[str, int]]) -> None:
    cluster = Cluster()
    for event, writes in steps:
        cluster.reconcile(writes)
        cluster.happen(event)
        assert cluster.job.status.restarts == Restarts()
        assert cluster.job.status.phase not in TERMINAL_PHASES


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(_RETRIES, st.integers(min_value=0, max_value=4)), max_size=40))
def test_a_failed_job_is_tried_again_once_for_each_retry_and_can_still_succeed(steps: list[tuple[str, int]]) -> None:
    cluster = Cluster()
    failures = 0
    for event, writes in steps:
        before = cluster.job.status.phase
        cluster.reconcile(writes)
        failures += before != "Failed" and cluster.job.status.phase == "Failed"
        cluster.happen(event)
        assert failures <= 1 + cluster.job.spec.run_policy.retry
        assert cluster.job.status.retry <= cluster.job.spec.run_policy.retry
    cluster.happen("resume")
    _settle(cluster)
    assert cluster.job.status.phase in TERMINAL_PHASES
    cluster.happen("retry")  # which has an effect only on a job that has failed
    _settle(cluster)
    assert cluster.job.status.phase == "Succeeded"
    assert cluster.job.status.failure is None


def _settle(cluster: Cluster) -> None:
    """Let time pass in which nothing goes wrong."""
    for event in ("stop", "start", "time", "finish") * 6:
        cluster.reconcile(9)
        cluster.happen(event)
    cluster.reconcile(9)
